/* Fake quantization of float32 tensors on a CPU, forward and backward, each in one pass.

   Python builds this file on first use (`building.py`) and calls it (`c_kernel.py`). It computes what
   torch's operations compute, bit for bit; only the sums for step sizes have another order. So it
   must be compiled without options that assume finite numbers, ignore the sign of zero, or contract
   products and sums. Fused products and sums are written out below, where they are wanted.

   Names: `low` and `high` are the lowest and highest code, `factor` scales the gradient of a step
   size, `steps` are all step sizes of a quantizer and `row` the index of the first one in use. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 4096      /* values whose contributions are summed in float32 */
#define MOST_THREADS 64

/* The product is not rounded: it is nearly as large as the value. */
#if defined(__FMA__) || defined(__aarch64__)
#define DIFFERENCE(code, step, value) __builtin_fmaf((code), (step), -(value))
#else
#define DIFFERENCE(code, step, value) ((float)((double)(code) * (step) - (value)))
#endif

/* As step sizes are used: positive, and 2^-120 at least. NaN stays. */
static float effective(float step) {
  float size = fabsf(step);
  return size < 0x1p-120f ? 0x1p-120f : size;
}

/* Half to even. Comparisons with NaN are false, so it stays; so does -0. */
static inline float code_of(float ratio, float low, float high) {
  float code = rintf(ratio);
  code = code < low ? low : code;
  return code > high ? high : code;
}

static void quantize(const float *restrict values, float *restrict result, int64_t count,
                     float step, float low, float high) {
  for (int64_t i = 0; i < count; i++) result[i] = code_of(values[i] / step, low, high) * step;
}

/* Writes the gradient of the values; returns the sum that the gradient of the step size is.
   `by_ratio`: whether the range is compared in step sizes, else in the unit of the values. */
static inline __attribute__((always_inline)) double backward(
    const float *restrict gradient, const float *restrict values, float *restrict values_gradient,
    int64_t count, float step, float low, float high, int by_ratio) {
  const float lowest = by_ratio ? low : low * step, highest = by_ratio ? high : high * step;
  const float reciprocal = 1.0f / step;
  double total = 0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t end = start + BLOCK < count ? start + BLOCK : count;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; i++) {
      const float value = values[i], upstream = gradient[i], ratio = value / step;
      const float code = code_of(ratio, low, high);
      const float measured = by_ratio ? ratio : value;
      /* Strict bounds: on the border the gradient is zero. `&`, since `&&` is a branch. */
      const int inside = (measured > lowest) & (measured < highest);
      values_gradient[i] = inside ? upstream : 0.0f;
      sum += upstream * (inside ? DIFFERENCE(code, step, value) * reciprocal : code);
    }
    total += sum;
  }
  return total;
}

/* --- Work that threads share: `work(task, first, last, number)` does a part of the items. */

typedef void (*Work)(void *task, int64_t first, int64_t last, int number);

typedef struct {
  Work work;
  void *task;
  int64_t first, last;
  int number;
} Part;

static void *run_part(void *argument) {
  const Part *part = argument;
  part->work(part->task, part->first, part->last, part->number);
  return NULL;
}

/* Threads live for one call: a pool would not survive a fork, nor share cores with torch's. */
static void share(Work work, void *task, int64_t items, int threads) {
  Part parts[MOST_THREADS];
  pthread_t handles[MOST_THREADS];
  int started[MOST_THREADS] = {0};
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  for (int number = 0; number < threads; number++)
    parts[number] = (Part){work, task, items * number / threads, items * (number + 1) / threads, number};
  for (int number = 1; number < threads; number++)
    started[number] = pthread_create(&handles[number], NULL, run_part, &parts[number]) == 0;
  for (int number = 0; number < threads; number++)
    if (!started[number]) run_part(&parts[number]);
  for (int number = 1; number < threads; number++)
    if (started[number]) pthread_join(handles[number], NULL);
}

/* --- One step size for a tensor */

typedef struct {
  const float *gradient, *values;
  float *output;
  float step, low, high;
  int64_t count;
  double sums[MOST_THREADS];
} TensorTask;

/* Threads share whole blocks, so that their number changes no sum in float32. */
static int64_t blocks(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

static int64_t values_before(const TensorTask *task, int64_t block) {
  return block * BLOCK < task->count ? block * BLOCK : task->count;
}

static void tensor_forward(void *argument, int64_t first, int64_t last, int number) {
  TensorTask *task = argument;
  const int64_t start = values_before(task, first), end = values_before(task, last);
  (void)number;
  quantize(task->values + start, task->output + start, end - start, task->step, task->low,
           task->high);
}

static void tensor_backward(void *argument, int64_t first, int64_t last, int number) {
  TensorTask *task = argument;
  const int64_t start = values_before(task, first), end = values_before(task, last);
  task->sums[number] = backward(task->gradient + start, task->values + start,
                                task->output + start, end - start, task->step, task->low,
                                task->high, 0);
}

void anyprec_tensor(const float *values, float *result, const float *steps, int64_t row, float low,
                    float high, int64_t count, int threads) {
  TensorTask task = {NULL, values, result, effective(steps[row]), low, high, count, {0}};
  share(tensor_forward, &task, blocks(count), threads);
}

void anyprec_tensor_backward(const float *gradient, const float *values, float *values_gradient,
                             const float *steps, float *steps_gradient, int64_t all_steps,
                             int64_t row, float low, float high, double factor, int64_t count,
                             int threads) {
  TensorTask task = {gradient, values, values_gradient, effective(steps[row]), low, high, count, {0}};
  share(tensor_backward, &task, blocks(count), threads);
  double total = 0;
  for (int number = 0; number < MOST_THREADS; number++) total += task.sums[number];
  memset(steps_gradient, 0, all_steps * sizeof(float));
  steps_gradient[row] = copysignf(1.0f, steps[row]) * (float)(total * factor);
}

/* --- A step size for each channel. In memory the values are (groups, repeats, channels, inner):
   `repeats` stretches of `inner` values for each of the channels of a group. */

typedef struct {
  const float *gradient, *values, *steps;
  float *output, *steps_gradient;
  float low, high;
  double factor;
  int64_t repeats, channels, inner;
} ChannelTask;

static int64_t stretch(const ChannelTask *task, int64_t channel, int64_t repeat) {
  const int64_t group = channel / task->channels, index = channel % task->channels;
  return ((group * task->repeats + repeat) * task->channels + index) * task->inner;
}

static void channels_forward(void *argument, int64_t first, int64_t last, int number) {
  const ChannelTask *task = argument;
  (void)number;
  for (int64_t channel = first; channel < last; channel++) {
    const float step = effective(task->steps[channel]);
    for (int64_t repeat = 0; repeat < task->repeats; repeat++) {
      const int64_t start = stretch(task, channel, repeat);
      quantize(task->values + start, task->output + start, task->inner, step, task->low,
               task->high);
    }
  }
}

static void channels_backward(void *argument, int64_t first, int64_t last, int number) {
  const ChannelTask *task = argument;
  (void)number;
  for (int64_t channel = first; channel < last; channel++) {
    const float step = effective(task->steps[channel]);
    double total = 0;
    for (int64_t repeat = 0; repeat < task->repeats; repeat++) {
      const int64_t start = stretch(task, channel, repeat);
      total += backward(task->gradient + start, task->values + start, task->output + start,
                        task->inner, step, task->low, task->high, 1);
    }
    const float sign = copysignf(1.0f, task->steps[channel]);
    task->steps_gradient[channel] = sign * (float)(total * task->factor);
  }
}

void anyprec_channels(const float *values, float *result, const float *steps, int64_t row,
                      float low, float high, int64_t groups, int64_t repeats, int64_t channels,
                      int64_t inner, int threads) {
  ChannelTask task = {NULL, values, steps + row, result, NULL, low,
                      high, 0,      repeats,     channels, inner};
  share(channels_forward, &task, groups * channels, threads);
}

void anyprec_channels_backward(const float *gradient, const float *values, float *values_gradient,
                               const float *steps, float *steps_gradient, int64_t all_steps,
                               int64_t row, float low, float high, double factor, int64_t groups,
                               int64_t repeats, int64_t channels, int64_t inner, int threads) {
  ChannelTask task = {gradient, values, steps + row, values_gradient, steps_gradient + row,
                      low,      high,   factor,      repeats,         channels,
                      inner};
  memset(steps_gradient, 0, all_steps * sizeof(float));
  share(channels_backward, &task, groups * channels, threads);
}
