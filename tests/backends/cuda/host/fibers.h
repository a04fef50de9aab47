// Fibers: one for each CUDA thread, all on one thread of the operating system, so that only the shim switches between
// them. ThreadSanitizer is told of each switch (without a happens-before edge), AddressSanitizer of each stack.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_THREAD__)
#define HOST_TSAN 1
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#else
#define HOST_TSAN 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define HOST_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define HOST_ASAN 0
#endif

// Sanitizers must not see the memory accesses of the shim itself, only those of the kernel.
#define HOST_UNSEEN __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

#if defined(__x86_64__) && !defined(HOST_UCONTEXT)
#define HOST_ASSEMBLY_SWITCH 1
#else  // on other processors: slower, because swapcontext saves the signal mask by a system call
#define HOST_ASSEMBLY_SWITCH 0
#include <ucontext.h>
#endif

namespace host {

constexpr size_t STACK_BYTES = 256 * 1024, GUARD_BYTES = 16 * 1024;

struct Context {
#if HOST_ASSEMBLY_SWITCH
  void *stack_pointer;
#else
  ucontext_t state;
#endif
};

// A stack, and ThreadSanitizer's handle of the fiber on it. Both are expensive to make, so they are reused.
struct Seat {
  char *stack;
  void *tsan;
};

// Neighbouring blocks use different stacks in turn, so that ThreadSanitizer can distinguish their accesses. All
// libraries of kernels in a process share this symbol.
constexpr unsigned TURNS = HOST_TSAN ? 2 : 1;
inline __attribute__((visibility("default"))) Seat seats[TURNS][1024];

struct Fiber {
  Context context;
  Seat *seat;
  void *asan_fake_stack;
};

// The scheduler runs on the caller's own stack.
struct Scheduler {
  Context context;
  void *tsan, *asan_fake_stack;
  const void *stack;
  size_t stack_bytes;
};
static Scheduler scheduler;

#if HOST_ASSEMBLY_SWITCH
// Save the registers that a call must preserve on the old stack, and load them from the new one.
extern "C" __attribute__((visibility("hidden"))) void host_switch_stack(void **save, void *to);
asm(".text\n.hidden host_switch_stack\n.globl host_switch_stack\n.type host_switch_stack,@function\n"
    "host_switch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size host_switch_stack,.-host_switch_stack\n");
#endif

HOST_UNSEEN inline void switch_context(Context &from, Context &to) {
#if HOST_ASSEMBLY_SWITCH
  host_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
}

// Make a fiber start at `entry` (which never returns) the next time it is resumed.
HOST_UNSEEN inline void prepare(Fiber &fiber, unsigned thread, unsigned turn, void (*entry)()) {
  Seat &seat = seats[turn % TURNS][thread];
  fiber.seat = &seat;
  if (!seat.stack) {
    seat.stack = (char *)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (seat.stack == MAP_FAILED) abort();
    mprotect(seat.stack, GUARD_BYTES, PROT_NONE);  // if a stack is too small, the process shall fault instead of overwriting memory
#if HOST_TSAN
    seat.tsan = __tsan_create_fiber(0);
#endif
  }
#if HOST_ASAN
  __asan_unpoison_memory_region(seat.stack + GUARD_BYTES, STACK_BYTES - GUARD_BYTES);
#endif
#if HOST_ASSEMBLY_SWITCH
  void **top = (void **)(seat.stack + STACK_BYTES - 64);
  *--top = nullptr;  // the return address of entry; keeps the stack aligned as after a call
  *--top = (void *)entry;
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  fiber.context.stack_pointer = top;
#else
  getcontext(&fiber.context.state);
  fiber.context.state.uc_stack.ss_sp = seat.stack;
  fiber.context.state.uc_stack.ss_size = STACK_BYTES;
  fiber.context.state.uc_link = nullptr;
  makecontext(&fiber.context.state, entry, 0);
#endif
}

// Switch from the scheduler to a fiber; returns when the fiber suspends itself.
HOST_UNSEEN inline void resume(Fiber &fiber) {
#if HOST_ASAN
  __sanitizer_start_switch_fiber(&scheduler.asan_fake_stack, fiber.seat->stack, STACK_BYTES);
#endif
#if HOST_TSAN
  __tsan_switch_to_fiber(fiber.seat->tsan, 1);
#endif
  switch_context(scheduler.context, fiber.context);
#if HOST_ASAN
  __sanitizer_finish_switch_fiber(scheduler.asan_fake_stack, nullptr, nullptr);
#endif
}

// What a fiber does first.
HOST_UNSEEN inline void arrive() {
#if HOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

// Switch from a fiber back to the scheduler; returns when the scheduler resumes the fiber.
HOST_UNSEEN inline void suspend(Fiber &fiber) {
#if HOST_ASAN
  __sanitizer_start_switch_fiber(&fiber.asan_fake_stack, scheduler.stack, scheduler.stack_bytes);
#endif
#if HOST_TSAN
  __tsan_switch_to_fiber(scheduler.tsan, 1);
#endif
  switch_context(fiber.context, scheduler.context);
#if HOST_ASAN
  __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

// Happens-before edges, for ThreadSanitizer alone.
HOST_UNSEEN inline void release(void *clock) {
#if HOST_TSAN
  __tsan_release(clock);
#else
  (void)clock;
#endif
}

HOST_UNSEEN inline void acquire(void *clock) {
#if HOST_TSAN
  __tsan_acquire(clock);
#else
  (void)clock;
#endif
}

// Called for a fiber that will not run again: everything that it did happens before later acquisitions of the clock.
HOST_UNSEEN inline void release_for(const Fiber &fiber, void *clock) {
#if HOST_TSAN
  __tsan_switch_to_fiber(fiber.seat->tsan, 1);
  __tsan_release(clock);
  __tsan_switch_to_fiber(scheduler.tsan, 1);
#else
  (void)fiber, (void)clock;
#endif
}

// Put around the shim's own calls of the C library.
HOST_UNSEEN inline void look_away(bool away) {
#if HOST_TSAN
  (away ? AnnotateIgnoreReadsBegin : AnnotateIgnoreReadsEnd)(__FILE__, __LINE__);
  (away ? AnnotateIgnoreWritesBegin : AnnotateIgnoreWritesEnd)(__FILE__, __LINE__);
#else
  (void)away;
#endif
}

}  // namespace host
