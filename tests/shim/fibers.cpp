// The threads of a block as fibers of one thread: fast, deterministic. makecontext starts a fiber, longjmp switches.
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

namespace shim {
namespace {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned size, arrived = 0;
  uint64_t turn = 0;
};

struct Fiber {
  Position position;
  jmp_buf state;
  bool started, done;
  const Barrier* waiting;
  uint64_t turn;  // of `waiting`, when it began to wait
  uint64_t slots[2];
  unsigned exchanges;
};

std::vector<Fiber> fibers;
std::vector<char> stacks;
std::vector<Barrier> warps;
Barrier block{0};
Fiber* running = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;

void enter() {
  (*body)();
  running->done = true;
  _longjmp(scheduler, 1);
}

void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.turn;
    return;
  }
  running->waiting = &barrier;
  running->turn = barrier.turn;
  if (_setjmp(running->state) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, char* stack) {
  running = &fiber;
  fiber.waiting = nullptr;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

void run_block(unsigned threads) {
  bool reverse = false;
  for (unsigned left = threads; left > 0; reverse = !reverse) {
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = reverse ? threads - 1 - i : i;
      Fiber& fiber = fibers[t];
      if (fiber.done || (fiber.waiting != nullptr && fiber.waiting->turn == fiber.turn)) continue;
      resume(fiber, stacks.data() + t * kStack);
      progress = true;
      if (fiber.done) --left;
    }
    if (!progress) throw std::runtime_error("a barrier that not every thread of its block or warp reaches");
  }
}

}  // namespace

const Position& position() {
  return running->position;
}

void block_barrier() {
  wait(block);
}

uint64_t exchange(uint64_t bits, int offset) {
  // Two slots in turn: nobody writes one again before everybody has read it.
  const unsigned slot = running->exchanges++ % 2;
  const unsigned thread = running->position.thread.x;
  running->slots[slot] = bits;
  wait(warps[thread / 32]);
  return fibers[thread ^ static_cast<unsigned>(offset)].slots[slot];
}

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (fibers.size() < threads) {
    fibers.resize(threads);
    stacks.resize(threads * kStack);
  }
  body = &kernel;
  block = Barrier{threads};
  warps.assign(threads / 32, Barrier{32});
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.position = {{t}, {b}, {threads}, {blocks}};
      fiber.started = fiber.done = false;
      fiber.waiting = nullptr;
      fiber.exchanges = 0;
    }
    run_block(threads);
  }
}

}  // namespace shim
