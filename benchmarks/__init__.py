"""What anyprec is worth and what it costs, measured."""
