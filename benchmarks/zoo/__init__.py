"""Every timm model converted and tried."""
