// One block of CUDA threads: which thread runs next, barriers, and the diagnosis of threads that wait forever.
#pragma once
#include "fibers.h"
#include <stdio.h>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace host {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP, NAMED_BARRIERS = 16;
constexpr unsigned MAX_COPIES = 256;  // copies by cp.async of each thread that are in flight
constexpr size_t SHARED_ALIGNMENT = 128, MESSAGE_BYTES = 512;

// The order of warps, of lanes in a warp, and of blocks.
enum Order { FORWARD = 0, REVERSE = 1, RANDOM = 2 };

struct Schedule {
  int threads, blocks;  // each an Order
  unsigned seed;
  int without;             // the number of a barrier that is passed as if it were not there
  unsigned char *reached;  // by number, whether a thread has reached the barrier; may be null
};

struct Place {
  const char *file;
  int line;
};

// A place where threads wait until enough of them have come.
struct Gate {
  unsigned arrived, generation, expected;
  const char *what;
  Place place;
  char clocks[2];  // for ThreadSanitizer: of even and of odd generations
};

struct Copy {
  void *shared;
  const void *global;
  unsigned bytes, source_bytes, group;
};

struct Thread {
  Fiber fiber;
  dim3 index;
  unsigned linear;
  bool done;
  Gate *gate;  // the gate where it waits until the gate's generation differs from `ticket`
  unsigned ticket;
  const char *what;
  Place place;
  unsigned copies, group;
  Copy copy[MAX_COPIES];
};

struct Warp {
  unsigned live;
  Gate gate;
  alignas(16) unsigned char given[2][WARP * 64], result[2][WARP * 64];  // of even and of odd exchanges
};

struct Block {
  dim3 index, block_dim, grid_dim;
  unsigned size, live;
  Thread thread[MAX_THREADS];
  Warp warp[MAX_WARPS];
  Gate barrier[NAMED_BARRIERS];
  unsigned char *shared;
  size_t shared_bytes;
  Schedule schedule;
  uint64_t random;
  char started, ended;  // clocks: the launch happens before every thread, and every thread before the end of the launch
  void (*kernel)(void *);
  void *arguments;
  bool failed;
  char message[MESSAGE_BYTES];
};
static Block block;
static Thread *current;

HOST_UNSEEN inline unsigned lane() { return current->linear % WARP; }

// End the launch with a message; the threads stay where they are.
template <class... Values> [[noreturn]] HOST_UNSEEN void fail(Place place, const char *format, Values... values) {
  if (!block.failed) {
    block.failed = true;
    look_away(true);
    int n = snprintf(block.message, MESSAGE_BYTES, "%s:%d, thread %u of block (%u, %u, %u): ", place.file, place.line,
                     current->linear, block.index.x, block.index.y, block.index.z);
    snprintf(block.message + n, MESSAGE_BYTES - n, format, values...);
    look_away(false);
  }
  suspend(current->fiber);
  abort();
}

// ---- waiting ------------------------------------------------------------------------------------------------------

HOST_UNSEEN inline void pass(Gate &gate, unsigned expected, const char *what, Place place, bool orders_memory) {
  if (gate.arrived == 0) {
    gate.what = what;
    gate.place = place;
    gate.expected = expected;
  } else if (gate.what != what || gate.place.line != place.line || gate.expected != expected) {
    fail(place, "%s for %u threads where others of them came to %s for %u at %s:%d", what, expected, gate.what,
         gate.expected, gate.place.file, gate.place.line);
  }
  const unsigned ticket = gate.generation;
  if (orders_memory) release(&gate.clocks[ticket % 2]);
  if (++gate.arrived == expected) {
    gate.arrived = 0;
    gate.generation++;
  } else {
    Thread *me = current;
    me->gate = &gate;
    me->ticket = ticket;
    me->what = what;
    me->place = place;
    suspend(me->fiber);
  }
  if (orders_memory) acquire(&gate.clocks[ticket % 2]);
}

// Whether a barrier is in place; sources that mutations.py has numbered ask this.
HOST_UNSEEN inline bool stands(int barrier) {
  if (block.schedule.reached) block.schedule.reached[barrier] = 1;
  return barrier != block.schedule.without;
}

HOST_UNSEEN inline void block_barrier(Place place) {
  if (block.live != block.size)
    fail(place, "__syncthreads after %u threads of the block returned", block.size - block.live);
  pass(block.barrier[0], block.size, "__syncthreads", place, true);
}

HOST_UNSEEN inline void named_barrier(unsigned id, unsigned threads, Place place) {
  if (id >= NAMED_BARRIERS) fail(place, "barrier %u: there are %u", id, NAMED_BARRIERS);
  if (threads % WARP || threads > block.size)
    fail(place, "barrier for %u threads: whole warps, at most the block's %u", threads, block.size);
  pass(block.barrier[id], threads, "named barrier", place, true);
}

HOST_UNSEEN inline Warp &whole_warp(unsigned mask, const char *what, Place place) {
  Warp &warp = block.warp[current->linear / WARP];
  if (mask != 0xffffffffu) fail(place, "%s with mask %#x: the shim knows whole warps only", what, mask);
  if (warp.live != WARP) fail(place, "%s after %u lanes of the warp returned", what, WARP - warp.live);
  return warp;
}

HOST_UNSEEN inline void warp_barrier(unsigned mask, Place place) {
  pass(whole_warp(mask, "__syncwarp", place).gate, WARP, "__syncwarp", place, true);
}

// Every lane of a warp gives a value, and `compute(given, result)` computes the results of all lanes from these values.
// An exchange is no memory barrier, as PTX says.
template <class Result, class Given, class Compute>
HOST_UNSEEN Result exchange(Given mine, unsigned mask, const char *what, Place place, Compute compute) {
  static_assert(sizeof(Given) <= 64 && sizeof(Result) <= 64, "a lane's place in Warp");
  Warp &warp = whole_warp(mask, what, place);
  const unsigned turn = warp.gate.generation % 2, me = lane();
  Given *given = (Given *)warp.given[turn];
  Result *result = (Result *)warp.result[turn];
  given[me] = mine;
  if (warp.gate.arrived == WARP - 1) compute(given, result);
  pass(warp.gate, WARP, what, place, false);
  return result[me];
}

// ---- running ------------------------------------------------------------------------------------------------------

HOST_UNSEEN inline void enter_thread() {
  arrive();
  acquire(&block.started);
  block.kernel(block.arguments);
  if (current->copies) fail({"end of the kernel", 0}, "%u cp.async were never waited for", current->copies);
  release(&block.ended);
  current->done = true;
  block.live--;
  block.warp[current->linear / WARP].live--;
  suspend(current->fiber);
  abort();
}

HOST_UNSEEN inline unsigned random_below(unsigned bound) {  // xorshift64*
  block.random ^= block.random >> 12;
  block.random ^= block.random << 25;
  block.random ^= block.random >> 27;
  return (unsigned)((block.random * 0x2545F4914F6CDD1Dull) >> 40) % bound;
}

HOST_UNSEEN inline void arrange(unsigned *order, unsigned n, int how) {
  for (unsigned i = 0; i < n; i++) order[i] = how == REVERSE ? n - 1 - i : i;
  if (how == RANDOM)
    for (unsigned i = n - 1; i > 0; i--) {
      const unsigned j = random_below(i + 1), kept = order[i];
      order[i] = order[j];
      order[j] = kept;
    }
}

// Resume once each lane of a warp that can go on; return whether there was one.
HOST_UNSEEN inline bool run_warp(unsigned warp) {
  unsigned order[WARP];
  const unsigned first = warp * WARP;
  arrange(order, WARP, block.schedule.threads);
  bool moved = false;
  for (unsigned i = 0; i < WARP && !block.failed; i++) {
    Thread &thread = block.thread[first + order[i]];
    if (thread.done || (thread.gate && thread.gate->generation == thread.ticket)) continue;
    thread.gate = nullptr;
    current = &thread;
    resume(thread.fiber);
    moved = true;
  }
  return moved;
}

HOST_UNSEEN inline void report_deadlock() {
  const Thread *first = nullptr, *other = nullptr;
  for (unsigned i = 0; i < block.size; i++) {
    const Thread &thread = block.thread[i];
    if (thread.done) continue;
    if (!first) first = &thread;
    else if (!other && thread.gate != first->gate) other = &thread;
  }
  block.failed = true;
  look_away(true);
  int n = snprintf(block.message, MESSAGE_BYTES, "deadlock in block (%u, %u, %u): %u threads returned, thread %u waits "
                   "at %s (%s:%d)", block.index.x, block.index.y, block.index.z, block.size - block.live, first->linear,
                   first->what, first->place.file, first->place.line);
  if (other)
    snprintf(block.message + n, MESSAGE_BYTES - n, ", thread %u at %s (%s:%d)", other->linear, other->what,
             other->place.file, other->place.line);
  look_away(false);
}

HOST_UNSEEN inline void run_block(unsigned turn) {
  const unsigned warps = block.size / WARP;
  block.live = block.size;
  for (Gate &gate : block.barrier) gate.arrived = gate.generation = 0;
  for (unsigned w = 0; w < warps; w++) {
    block.warp[w].live = WARP;
    block.warp[w].gate.arrived = block.warp[w].gate.generation = 0;
  }
  release(&block.started);  // not acquired by the next block's scheduler: blocks stay unordered
  for (unsigned i = 0; i < block.size; i++) {
    Thread &thread = block.thread[i];
    thread.linear = i;
    const dim3 size = block.block_dim;
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.done = false;
    thread.gate = nullptr;
    thread.copies = thread.group = 0;
    prepare(thread.fiber, i, turn, enter_thread);
  }
  // A warp runs as far as it can before the next one runs, so without a barrier it gets far ahead of the others.
  unsigned order[MAX_WARPS];
  while (block.live && !block.failed) {
    bool moved = false;
    arrange(order, warps, block.schedule.threads);
    for (unsigned i = 0; i < warps && !block.failed; i++)
      while (run_warp(order[i])) {
        moved = true;
        if (block.schedule.threads == RANDOM && random_below(4) == 0) break;
      }
    if (!moved && !block.failed) report_deadlock();
  }
}

// Shared memory of exactly the size asked for, not better aligned than promised, and full of NaN.
struct SharedMemory {
  unsigned char *base = nullptr, *start = nullptr;
  HOST_UNSEEN void fill(size_t bytes) {
    const size_t room = 4 * SHARED_ALIGNMENT + (bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    base = (unsigned char *)aligned_alloc(2 * SHARED_ALIGNMENT, (room + 255) / 256 * 256);
    if (!base) abort();
    start = base + SHARED_ALIGNMENT;
    for (size_t i = 0; i < bytes; i++) start[i] = 0xff;
#if HOST_ASAN
    __asan_poison_memory_region(base, SHARED_ALIGNMENT);
    __asan_poison_memory_region(start + bytes, room - SHARED_ALIGNMENT - bytes);
#endif
  }
  HOST_UNSEEN void drop(size_t bytes) {
#if HOST_ASAN
    __asan_unpoison_memory_region(base, bytes + 4 * SHARED_ALIGNMENT);
#endif
    (void)bytes;
    free(base);
  }
};

HOST_UNSEEN inline int run_grid(const unsigned *grid, const unsigned *size, size_t shared_bytes, const Schedule *schedule,
                                void (*kernel)(void *), void *arguments, char *message) {
  block.grid_dim = {grid[0], grid[1], grid[2]};
  block.block_dim = {size[0], size[1], size[2]};
  block.size = size[0] * size[1] * size[2];
  block.shared_bytes = shared_bytes;
  block.schedule = *schedule;
  block.random = 0x9E3779B97F4A7C15ull * (schedule->seed + 1ull);
  block.kernel = kernel;
  block.arguments = arguments;
  block.failed = false;
  scheduler.tsan = nullptr;
#if HOST_TSAN
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  const unsigned blocks = grid[0] * grid[1] * grid[2];
  unsigned *order = (unsigned *)malloc(blocks * sizeof(unsigned));
  SharedMemory *shared = (SharedMemory *)calloc(blocks, sizeof(SharedMemory));
  arrange(order, blocks, schedule->blocks);
  for (unsigned i = 0; i < blocks && !block.failed; i++) {
    const unsigned b = order[i];
    block.index = {b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1])};
    shared[i].fill(shared_bytes);
    block.shared = shared[i].start;
    run_block(i);
    if (!HOST_TSAN) shared[i].drop(shared_bytes);  // otherwise a sanitizer would confuse a later block's memory with this one's
  }
  if (block.failed)
    for (unsigned i = 0; i < block.size; i++) release_for(block.thread[i].fiber, &block.ended);
  acquire(&block.ended);
  if (HOST_TSAN)
    for (unsigned i = 0; i < blocks; i++) free(shared[i].base);
  free(shared);
  free(order);
  if (block.failed) {
    look_away(true);
    snprintf(message, MESSAGE_BYTES, "%s", block.message);
    look_away(false);
  }
  return block.failed;
}

// ---- arguments ----------------------------------------------------------------------------------------------------

template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <size_t... I> struct IndicesTo<0, I...> { using type = Indices<I...>; };

template <class... A> struct Call {
  void (*kernel)(A...);
  void **arguments;
  template <size_t... I> void run(Indices<I...>) { kernel(*(A *)arguments[I]...); }
  static void enter(void *self) { ((Call *)self)->run(typename IndicesTo<sizeof...(A)>::type{}); }
};

template <class... A>
int launch(void (*kernel)(A...), const unsigned *grid, const unsigned *size, size_t shared_bytes,
           const Schedule *schedule, void **arguments, char *message) {
  Call<A...> call{kernel, arguments};
  return run_grid(grid, size, shared_bytes, schedule, Call<A...>::enter, &call, message);
}

template <class T> constexpr int signed_size(T **) { return -(int)sizeof(void *); }  // negative for a pointer
template <class T> constexpr int signed_size(T *) { return sizeof(T); }

// The bytes of each parameter, negative for pointers; and the number of parameters.
template <class... A> int parameters(void (*)(A...), int *sizes) {
  const int all[] = {signed_size((A *)nullptr)..., 0};
  for (size_t i = 0; i < sizeof...(A); i++) sizes[i] = all[i];
  return sizeof...(A);
}

}  // namespace host
