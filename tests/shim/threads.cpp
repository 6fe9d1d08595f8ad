// The threads of a block as threads of the machine, reused from block to block and from launch to launch: what
// ThreadSanitizer can watch.
#include <pthread.h>

#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace shim {
namespace {

class Barrier {
 public:
  explicit Barrier(unsigned size) {
    pthread_barrier_init(&barrier_, nullptr, size);
  }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  ~Barrier() {
    pthread_barrier_destroy(&barrier_);
  }
  void wait() {
    pthread_barrier_wait(&barrier_);
  }

 private:
  pthread_barrier_t barrier_;
};

// Threads that live as long as the program, and the block they execute.
struct Pool {
  explicit Pool(unsigned threads) : size(threads), turn(threads + 1), all(threads), slots(2 * threads) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Barrier>(32));
    for (unsigned t = 0; t < threads; ++t) std::thread([this, t] { work(t); }).detach();
  }
  void work(unsigned thread);

  const unsigned size;
  Barrier turn;  // of the workers and the launching thread
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<uint64_t> slots;
  unsigned blocks = 0;
  const std::function<void()>* kernel = nullptr;
};

thread_local Position here;
Pool* pool = nullptr;
thread_local unsigned exchanges = 0;

void Pool::work(unsigned thread) {
  for (;;) {
    turn.wait();
    for (unsigned b = 0; b < blocks; ++b) {
      here = {{thread}, {b}, {size}, {blocks}};
      (*kernel)();
      all.wait();
    }
    turn.wait();
  }
}

}  // namespace

const Position& position() {
  return here;
}

void block_barrier() {
  pool->all.wait();
}

uint64_t exchange(uint64_t bits, int offset) {
  // Two slots in turn: nobody writes one again before everybody has read it.
  const unsigned slot = exchanges++ % 2;
  pool->slots[2 * here.thread.x + slot] = bits;
  pool->warps[here.thread.x / 32]->wait();
  return pool->slots[2 * (here.thread.x ^ static_cast<unsigned>(offset)) + slot];
}

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (pool == nullptr) pool = new Pool(threads);
  if (pool->size != threads) throw std::runtime_error("one block size a program");
  pool->blocks = blocks;
  pool->kernel = &kernel;
  pool->turn.wait();
  pool->turn.wait();
}

}  // namespace shim
