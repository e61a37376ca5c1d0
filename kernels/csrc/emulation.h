// A stand-in for the GPU: the kernels' sources compiled as C++20 by a host compiler (-DHF_LINATTN_EMULATION) and run.
//
// One fiber for each thread of a cluster of blocks, clusters one after another, all in one host thread. A fiber runs
// until it meets something that takes several threads (a barrier, a shuffle, a matrix instruction) or time (a copy, an
// mbarrier); a block runs until all its fibers have.
// Made to find faults rather than to be fast:
//   - shared memory starts as NaN, and has unreadable pages at both ends;
//   - asynchronous work is done as late as the hardware may do it: cp.async and wgmma when they are waited for, copies
//     of the copy engine, and asynchronous stores and arrivals at blocks of the cluster, when nobody can run otherwise,
//     ordinary stores to such blocks when the thread arrives at the cluster's barrier. A missing wait therefore shows as
//     wrong numbers;
//   - wgmma sees what the asynchronous proxy would see: writes without fence.proxy.async are an error, and so is
//     overwriting an operand before wgmma is waited for;
//   - threads that can never go on are listed with what each of them waits for;
//   - a block that ends before all that is under way to its shared memory has come is an error;
//   - HF_LINATTN_EMULATED_SEED other than 0 makes the order of threads and blocks, and the time of what is under way,
//     random.
// Not seen: races between threads that the chosen order happens to hide, and everything about speed.
#ifndef HF_LINATTN_EMULATION_H_
#define HF_LINATTN_EMULATION_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <vector_functions.h>
#include <vector_types.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#undef __shared__  // no replacement: a static shared array would silently become one array a thread
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// Stands for the driver's opaque type; launch.cuh fills it in.
struct alignas(64) CUtensorMap {
  const char* base;
  int64_t element_bytes;
  int64_t dims[4];     // dim, heads, tokens, batch
  int64_t strides[3];  // bytes: heads, tokens, batch
  int box_tokens;
};

namespace hf_linattn {
namespace emulation {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 8, kNamedBarriers = 16;
constexpr uint32_t kWindow = 1024;  // shared address of the first byte; on hardware, too, it is not 0
constexpr uint32_t kRankShift = 24, kRemote = 1 << 23;  // shared address in a block of the cluster: rank, mark, address
constexpr uint32_t kRowBytes = 128, kSwizzleChunk = 16;
constexpr size_t kStackBytes = 256 * 1024, kPage = 4096, kSmemRegion = 256 * 1024, kGuard = 16 * kPage;

inline int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : atoi(text);
}

// Most shared memory of a block, by compute capability.
inline size_t smem_limit(int capability) {
  if (capability >= 90 && capability < 120) return 227 * size_t{1024};
  return (capability == 80 || capability == 87 ? 163 : 99) * size_t{1024};
}

#ifdef __x86_64__
using Context = void*;
// Registers that a call preserves go to the old stack, those of the new stack come back. noipa: the compiler must not
// conclude from the body that other registers survive.
[[gnu::naked, gnu::noinline, gnu::noipa]] inline void switch_context(Context* /*rdi*/, Context /*rsi*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
inline Context new_context(char* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_end) - 1;  // entered by ret: the stack is then 8 off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#else
using Context = std::shared_ptr<ucontext_t>;
inline void switch_context(Context* from, Context to) {
  if (*from == nullptr) *from = std::make_shared<ucontext_t>();
  swapcontext(from->get(), to.get());
}
inline Context new_context(char* stack_end, void (*entry)()) {
  auto context = std::make_shared<ucontext_t>();
  getcontext(context.get());
  context->uc_stack.ss_sp = stack_end - kStackBytes;
  context->uc_stack.ss_size = kStackBytes;
  makecontext(context.get(), entry, 0);
  return context;
}
#endif

struct Copy {  // one cp.async
  uint32_t smem;
  const void* global;
  int valid_bytes;
};

struct TensorCopy {
  CUtensorMap map;
  int rank;  // of the block that it goes to
  uint32_t smem, bar;
  int64_t at[4];
};

struct Signal {  // an arrival at an mbarrier, or a store that an mbarrier counts, in a block of the cluster
  int rank;
  bool stores, from_other_block;
  uint32_t bar, smem;
  float value;
};

struct MBarrier {
  int64_t count, pending, bytes;
  uint32_t phase;
  bool has_remote_signals;
};

// First in, first out, or any of them in the place of the first.
template <class T>
class Queue {
 public:
  size_t size() const { return items_.size() - first_; }
  bool empty() const { return size() == 0; }
  const T* begin() const { return items_.data() + first_; }
  const T* end() const { return items_.data() + items_.size(); }
  void push(const T& item) { items_.push_back(item); }
  void clear() {
    items_.clear();
    first_ = 0;
  }
  T take(size_t i) {
    if (i != 0) std::swap(items_[first_], items_[first_ + i]);
    const T item = items_[first_++];
    if (first_ == items_.size()) {
      clear();
    } else if (first_ > kMaxThreads && first_ > items_.size() / 2) {
      items_.erase(items_.begin(), items_.begin() + static_cast<ptrdiff_t>(first_));
      first_ = 0;
    }
    return item;
  }

 private:
  std::vector<T> items_;
  size_t first_ = 0;
};

struct Thread {
  Context context{};
  char* stack = nullptr;
  bool done = false;
  const char* waits_for = nullptr;  // null while it can run
  uint32_t detail[2] = {};          // address and parity, or id and count
  std::vector<std::vector<Copy>> copy_groups;
  std::vector<Copy> copies;
  bool wgmma_fenced = false;
  bool at_cluster = false;  // has arrived at the cluster's barrier, in this phase of it, and not waited
  uint32_t cluster_phase = 0;
};

// One wgmma of one warp: 16 rows of the product.
struct Wgmma {
  int columns;
  bool transposed, accumulate;
  uint64_t descriptor;
  float (*to_float)(uint16_t);
  float a[16][16];
  std::vector<uint16_t> b;  // [16][columns] as seen when issued
  float* d[kWarp];
};

struct Warp {
  const char* meets_for = nullptr;
  uint64_t tag = 0;
  int arrived = 0, lanes = 0;
  void* operands[kWarp] = {};
  std::vector<std::vector<Wgmma>> wgmma_groups;
  std::vector<Wgmma> wgmmas;
  size_t wgmma_count = 0;
};

struct Meeting {  // a barrier of the block
  int arrived = 0, expected = 0;
};

struct Block {
  int rank = 0, live = 0;  // ended where no thread lives
  uint3 index = {};
  Queue<int> ready;
  char *smem = nullptr, *smem_end = nullptr;
  std::vector<char> async_smem;
  bool fenced = false;
  Meeting meetings[kNamedBarriers];
  std::map<uint32_t, MBarrier> mbarriers;
};

class Engine {
 public:
  static Engine& get() {
    static Engine engine;
    return engine;
  }

  // Null, or why the launch failed. Blocks of one cluster are neighbours in x.
  const char* run(dim3 grid, int cluster, int threads, size_t smem_bytes, std::function<void()> body);

  // --- for the threads of the running block ---

  int lane() const { return current_ % kWarp; }
  Thread& self() { return threads_[current_]; }
  Warp& warp() { return warps_[current_ / kWarp]; }
  bool by_chance() { return seed_ != 0 && random() % 2 == 0; }

  [[noreturn, gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem_, sizeof problem_, format, arguments);
    va_end(arguments);
    char place[96];
    snprintf(place, sizeof place, " [block %u,%u,%u thread %d]", blockIdx.x, blockIdx.y, blockIdx.z,
             current_ % kMaxThreads);
    strncat(problem_, place, sizeof problem_ - strlen(problem_) - 1);
    leave();
  }

  char* smem() { return block_->smem; }
  size_t smem_bytes() const { return smem_bytes_; }

  // Address of `bytes` bytes of shared memory, which must lie inside the block's.
  char* at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    if (address < kWindow || address - kWindow + uint64_t{bytes} > smem_bytes_ || address % alignment != 0) [[unlikely]]
      refuse(address, bytes, alignment, what);
    return block_->smem + (address - kWindow);
  }

  // The same byte as the asynchronous proxy sees it.
  char* async_view(const char* p) { return block_->async_smem.data() + (p - block_->smem); }
  void fence_async() { block_->fenced = true; }

  int rank() const { return block_->rank; }
  int cluster_size() const { return cluster_; }
  uint32_t map_rank(uint32_t address, uint32_t rank) {
    at(address, 1, 1, "map_shared_rank");
    if (rank >= static_cast<uint32_t>(cluster_)) fail("map_shared_rank: rank %u; the cluster has %d", rank, cluster_);
    return rank << kRankShift | kRemote | address;
  }
  // The block that an address of map_rank is in; the address becomes the one inside it.
  Block& find_block(uint32_t& address, uint32_t bytes, uint32_t alignment, const char* what) {
    const uint32_t rank = address >> kRankShift;
    if ((address & kRemote) == 0 || rank >= static_cast<uint32_t>(cluster_))
      fail("%s: shared address %#x is none that map_shared_rank gave", what, address);
    address &= kRemote - 1;
    at(address, bytes, alignment, what);
    return running(static_cast<int>(rank), what);
  }
  Block& running(int rank, const char* what) {
    Block& b = blocks_[rank];
    if (b.live == 0) fail("%s: block %u,%u,%u has ended", what, b.index.x, b.index.y, b.index.z);
    return b;
  }

  // Lets the threads of a warp meet: the last to come calls compute(operands of all lanes) and runs on.
  template <class F>
  void meet_warp(const char* what, uint64_t tag, void* operand, F compute) {
    Warp& w = warp();
    if (w.arrived == 0) {
      w.meets_for = what;
      w.tag = tag;
    } else if ((w.meets_for != what && strcmp(w.meets_for, what) != 0) || w.tag != tag) {
      fail("lanes of one warp have come to different instructions: %s and %s", w.meets_for, what);
    }
    w.operands[lane()] = operand;
    if (++w.arrived < w.lanes) return wait(what, 0, 0);
    publish(*block_);
    compute(w.operands);
    w.arrived = 0;
    const int first = current_ / kWarp * kWarp;
    for (int i = first; i < first + w.lanes; ++i)
      if (i != current_) wake(*block_, i);
  }

  void meet_block(const char* what, int id, int count) {
    if (id < 0 || id >= kNamedBarriers) fail("%s: barrier %d; there are %d", what, id, kNamedBarriers);
    if (count % kWarp != 0 && count != live()) fail("%s: %d threads are no whole number of warps", what, count);
    Meeting& m = block_->meetings[id];
    if (m.arrived != 0 && m.expected != count && !(id == 0 && count == live()))
      fail("%s: barrier %d is used for %d and for %d threads", what, id, m.expected, count);
    m.expected = count;
    ++m.arrived;
    if (m.arrived < m.expected) return wait(what, id, count);
    complete(id);
  }
  int live() const { return block_->live; }

  MBarrier& mbarrier(int rank, uint32_t bar, const char* what) {
    at(bar, 8, 8, what);
    Block& b = blocks_[rank];
    const auto found = b.mbarriers.find(bar);
    if (found == b.mbarriers.end())
      fail("%s: no barrier was set up at shared offset %u of block %u,%u,%u", what, bar - kWindow, b.index.x, b.index.y,
           b.index.z);
    return found->second;
  }
  void init_mbarrier(uint32_t bar, uint32_t count) {
    at(bar, 8, 8, "mbarrier_init");
    if (count == 0 || count >= 1u << 20) fail("mbarrier_init: count %u", count);
    block_->mbarriers[bar] = {count, count, 0, 0, false};
  }
  void arrive(int rank, uint32_t bar, int64_t arrivals, int64_t bytes) {
    MBarrier& b = mbarrier(rank, bar, "mbarrier_arrive");
    Block& block = blocks_[rank];
    publish(block);
    b.pending -= arrivals;
    b.bytes += bytes;
    if (b.pending < 0)
      fail("mbarrier at shared offset %u of block %u,%u,%u: more arrivals than its count of %lld in one phase",
           bar - kWindow, block.index.x, block.index.y, block.index.z, static_cast<long long>(b.count));
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.count;
    ++b.phase;
    for (int i = first_thread(block); i < end_thread(block); ++i)
      if (!threads_[i].done && threads_[i].waits_for == kMBarrierWait && threads_[i].detail[0] == bar &&
          (b.phase & 1) != threads_[i].detail[1])
        wake(block, i);
  }
  void wait_mbarrier(uint32_t bar, uint32_t parity, bool acquires_cluster) {
    if (parity > 1) fail("mbarrier_wait: parity %u", parity);
    const MBarrier& b = mbarrier(rank(), bar, kMBarrierWait);
    while ((b.phase & 1) == parity) wait(kMBarrierWait, bar, parity);
    if (b.has_remote_signals && !acquires_cluster)
      fail("mbarrier_wait: other blocks signal the barrier at shared offset %u; what they wrote takes "
           "mbarrier_wait_cluster", bar - kWindow);
  }

  void start(const TensorCopy& copy) {
    if (by_chance())
      finish(copy);
    else
      tensor_copies_.push(copy);
  }
  void start(const Signal& signal) {
    publish(*block_);
    if (by_chance())
      finish(signal);
    else
      (signal.stores ? stores_ : arrivals_).push(signal);
  }

  void arrive_cluster() {
    Thread& t = self();
    if (t.at_cluster) fail("cluster_arrive: twice without cluster_wait");
    t.at_cluster = true;
    t.cluster_phase = cluster_phase_;
    publish(*block_);
    if (++cluster_arrived_ == cluster_live_) complete_cluster();
  }
  void wait_cluster() {
    Thread& t = self();
    if (!t.at_cluster) fail("cluster_wait: without cluster_arrive");
    t.at_cluster = false;
    if (t.cluster_phase == cluster_phase_) wait(kClusterWait, 0, 0);
  }

  // All warps of a warpgroup must issue the same wgmma in the same order.
  void log_wgmma(uint64_t descriptor, uint64_t kind) {
    const int group = current_ / 128;
    if (threads_in_block_ < current_ % kMaxThreads / 128 * 128 + 128)
      fail("wgmma: the warpgroup has fewer than 4 warps");
    std::vector<std::array<uint64_t, 2>>& log = wgmma_logs_[group];
    const size_t i = warp().wgmma_count++;
    if (i == log.size()) log.push_back({descriptor, kind});
    if (log[i][0] != descriptor || log[i][1] != kind)
      fail("wgmma: instruction %zu differs between the warps of a warpgroup", i);
  }

 private:
  static constexpr const char *kMBarrierWait = "mbarrier_wait", *kClusterWait = "cluster_wait";

  Engine() {
    threads_.resize(kMaxThreads * kMaxCluster);
    warps_.resize(threads_.size() / kWarp);
  }

  // Threads of a block, as indices of threads_.
  static int first_thread(const Block& block) { return block.rank * kMaxThreads; }
  int end_thread(const Block& block) const { return first_thread(block) + threads_in_block_; }

  static char* map_guarded(size_t bytes) {
    void* p = mmap(nullptr, bytes + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + kGuard, bytes, PROT_READ | PROT_WRITE) != 0) {
      perror("hf_linattn emulation: memory for a block");
      abort();
    }
    return static_cast<char*>(p) + kGuard;
  }

  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 16);
  }

  void run_cluster(uint64_t first_block);
  void start_block(int rank, uint64_t index);
  static void thread_main();
  static void on_fault(int signal, siginfo_t* info, void*);
  void finish(const TensorCopy& copy);
  void finish(const Signal& signal);

  [[gnu::noinline]] void wait(const char* what, uint32_t x, uint32_t y) {
    Thread& t = self();
    t.waits_for = what;
    t.detail[0] = x;
    t.detail[1] = y;
    go_on();
  }

  void wake(Block& block, int i) {
    threads_[i].waits_for = nullptr;
    block.ready.push(i);
  }

  void complete(int id) {
    publish(*block_);
    block_->meetings[id].arrived = 0;
    for (int i = first_thread(*block_); i < end_thread(*block_); ++i) {
      Thread& t = threads_[i];
      const bool here = t.waits_for == kSyncThreads    ? id == 0
                        : t.waits_for == kNamedBarrier ? t.detail[0] == static_cast<uint32_t>(id)
                                                       : false;
      if (!t.done && here && i != current_) wake(*block_, i);
    }
  }

  void complete_cluster() {
    cluster_arrived_ = 0;
    ++cluster_phase_;
    for (int rank = 0; rank < cluster_; ++rank)
      for (int i = first_thread(blocks_[rank]); i < end_thread(blocks_[rank]); ++i)
        if (!threads_[i].done && threads_[i].waits_for == kClusterWait) wake(blocks_[rank], i);
  }

  // A fence takes effect at the next point where other threads can learn of it. It publishes what the others wrote,
  // too: who forgets the fence while another thread does not is not found.
  void publish(Block& block) {
    if (!block.fenced) return;
    block.fenced = false;
    memcpy(block.async_smem.data(), block.smem, smem_bytes_);
  }

  // Switches from this thread, which has to wait or is done, to one that can run; to one of another block only where
  // this block has none, so that one is ahead of the others, or at random times with a seed.
  [[gnu::noinline]] void go_on() {
    if (seed_ != 0 && under_way() != 0 && random() % 8 == 0) finish_something();
    Block* block = block_;
    if (seed_ != 0 && cluster_ > 1 && random() % 64 == 0) block = &blocks_[random() % static_cast<uint32_t>(cluster_)];
    if (block->ready.empty()) block = find_ready(block->rank);
    if (block == nullptr) {
      if (cluster_live_ != 0) describe_deadlock();
      leave();
    }
    const int next = block->ready.take(seed_ == 0 ? 0 : random() % block->ready.size());
    const int before = current_;
    if (next == before) return;
    enter(*block, next);
    switch_context(&threads_[before].context, threads_[next].context);
  }

  void enter(Block& block, int thread) {
    current_ = thread;
    threadIdx.x = static_cast<unsigned>(thread % kMaxThreads);
    if (&block == block_) return;
    block_ = &block;
    blockIdx = block.index;
  }

  // The next block, from that of the rank on, with a thread that can run; null if none will ever.
  Block* find_ready(int rank) {
    for (;;) {
      for (int i = 0; i < cluster_; ++i)
        if (Block& block = blocks_[(rank + i) % cluster_]; !block.ready.empty()) return &block;
      if (under_way() == 0) return nullptr;
      finish_something();
    }
  }

  size_t under_way() const { return arrivals_.size() + tensor_copies_.size() + stores_.size(); }

  // Without a seed arrivals come first: who takes one for a sign that a store has come as well is found.
  void finish_something() {
    size_t i = seed_ == 0 ? 0 : random() % under_way();
    if (i < arrivals_.size()) return finish(arrivals_.take(i));
    i -= arrivals_.size();
    if (i < tensor_copies_.size()) return finish(tensor_copies_.take(i));
    finish(stores_.take(i - tensor_copies_.size()));
  }

  // The last thread of the running block has ended.
  void end_block() {
    const auto coming = [this](const auto& queue) {
      return std::count_if(queue.begin(), queue.end(), [this](const auto& x) { return x.rank == rank(); });
    };
    const ptrdiff_t copies = coming(tensor_copies_), stores = coming(stores_), arrivals = coming(arrivals_);
    if (copies + stores + arrivals != 0)
      fail("the block ends with %td copies, %td stores and %td arrivals to its shared memory under way", copies, stores,
           arrivals);
  }

  void describe_deadlock() {
    size_t used = 0;
    const auto add = [&](const char* format, auto... arguments) {
      if (used < sizeof problem_)
        used += static_cast<size_t>(snprintf(problem_ + used, sizeof problem_ - used, format, arguments...));
    };
    for (int rank = 0; rank < cluster_; ++rank) {
      Block& block = blocks_[rank];
      if (block.live == 0) continue;
      add("%sin block %u,%u,%u:", used == 0 ? "deadlock " : "\n", block.index.x, block.index.y, block.index.z);
      for (int first = first_thread(block), i = first; i < end_thread(block); i = first) {
        const Thread& t = threads_[i];
        for (first = i + 1; first < end_thread(block); ++first) {
          const Thread& u = threads_[first];
          if (u.done != t.done || u.waits_for != t.waits_for || u.detail[0] != t.detail[0] ||
              u.detail[1] != t.detail[1])
            break;
        }
        if (t.done) continue;
        add("\n  threads %d-%d wait for ", i % kMaxThreads, (first - 1) % kMaxThreads);
        if (t.waits_for == kMBarrierWait) {
          const MBarrier& b = block.mbarriers[t.detail[0]];
          add("parity %u of mbarrier at shared offset %u (phase %u; %lld arrivals, %lld bytes short)", t.detail[1],
              t.detail[0] - kWindow, b.phase, static_cast<long long>(b.pending), static_cast<long long>(b.bytes));
        } else if (t.waits_for == kSyncThreads || t.waits_for == kNamedBarrier) {
          const Meeting& m = block.meetings[t.detail[0]];
          add("%s %u, %d of %d threads there", t.waits_for, t.detail[0], m.arrived, m.expected);
        } else if (t.waits_for == kClusterWait) {
          add("%s, %d of %d threads of the cluster there", t.waits_for, cluster_arrived_, cluster_live_);
        } else {
          add("%s with its warp", t.waits_for);
        }
      }
    }
  }

  [[noreturn, gnu::noinline]] void refuse(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    if ((address & kRemote) != 0)
      fail("%s: the shared address is one that map_shared_rank gave for rank %u; it takes one of this block", what,
           address >> kRankShift);
    if (address < kWindow || address - kWindow + uint64_t{bytes} > smem_bytes_)
      fail("%s: %u bytes at shared offset %lld, but the block has %zu", what, bytes,
           static_cast<long long>(address) - kWindow, smem_bytes_);
    fail("%s: shared offset %u is not a multiple of %u", what, address - kWindow, alignment);
  }

  // Back to run_cluster, for good.
  [[noreturn]] void leave() {
    Context dropped{};
    switch_context(&dropped, main_);
    abort();
  }

 public:
  static constexpr const char *kSyncThreads = "__syncthreads", *kNamedBarrier = "named_barrier_sync";

 private:
  std::vector<Thread> threads_;  // kMaxThreads places for each rank; so also the warps
  std::vector<Warp> warps_;
  std::array<Block, kMaxCluster> blocks_;  // by rank
  Block* block_ = nullptr;                 // the running one
  size_t smem_bytes_ = 0;
  int current_ = 0, threads_in_block_ = 0, seed_ = 0, cluster_ = 1;
  int cluster_live_ = 0, cluster_arrived_ = 0;  // threads
  uint32_t cluster_phase_ = 0;
  uint64_t random_ = 1;
  Context main_{};
  std::function<void()> body_;
  Queue<TensorCopy> tensor_copies_;
  Queue<Signal> stores_, arrivals_;
  std::map<int, std::vector<std::array<uint64_t, 2>>> wgmma_logs_;
  char problem_[1900] = "";
  sigjmp_buf escape_;
};

inline void Engine::thread_main() {
  Engine& engine = get();
  engine.body_();
  Thread& t = engine.self();
  if (!t.copies.empty() || !t.copy_groups.empty()) engine.fail("a thread ends before its cp.async are waited for");
  Warp& w = engine.warp();
  if (!w.wgmmas.empty() || !w.wgmma_groups.empty()) engine.fail("a warp ends before its wgmma are waited for");
  t.done = true;
  Block& block = *engine.block_;
  --block.live;
  // A thread that is gone counts as arrived, as on the GPU.
  Meeting& m = block.meetings[0];
  if (m.arrived != 0 && m.arrived == block.live) engine.complete(0);
  --engine.cluster_live_;
  engine.cluster_arrived_ -= t.at_cluster && t.cluster_phase == engine.cluster_phase_;
  if (engine.cluster_arrived_ != 0 && engine.cluster_arrived_ == engine.cluster_live_) engine.complete_cluster();
  if (block.live == 0) engine.end_block();
  engine.go_on();
}

inline void Engine::start_block(int rank, uint64_t index) {
  Block& b = blocks_[rank];
  if (b.smem_end == nullptr) {
    b.smem_end = map_guarded(kSmemRegion) + kSmemRegion;
    b.async_smem.resize(kSmemRegion);
  }
  b.rank = rank;
  b.index = {static_cast<unsigned>(index % gridDim.x), static_cast<unsigned>(index / gridDim.x % gridDim.y),
             static_cast<unsigned>(index / gridDim.x / gridDim.y)};
  b.smem = b.smem_end - (smem_bytes_ + 1023) / 1024 * 1024;
  memset(b.smem, 0xff, static_cast<size_t>(b.smem_end - b.smem));
  memset(b.async_smem.data(), 0xff, smem_bytes_);
  b.fenced = false;
  std::fill(std::begin(b.meetings), std::end(b.meetings), Meeting());
  b.mbarriers.clear();
  b.ready.clear();
  b.live = threads_in_block_;
  const int first = first_thread(b);
  for (int i = first; i < end_thread(b); ++i) {
    Thread& t = threads_[i];
    if (t.stack == nullptr) t.stack = map_guarded(kStackBytes);
    char* stack = t.stack;
    t = Thread();
    t.stack = stack;
    t.context = new_context(stack + kStackBytes, &thread_main);
    b.ready.push(i);
  }
  for (int i = 0; i < threads_in_block_; i += kWarp) {
    Warp& w = warps_[(first + i) / kWarp];
    w = Warp();
    w.lanes = std::min(kWarp, threads_in_block_ - i);
  }
}

inline void Engine::run_cluster(uint64_t first_block) {
  tensor_copies_.clear();
  stores_.clear();
  arrivals_.clear();
  wgmma_logs_.clear();
  cluster_live_ = cluster_ * threads_in_block_;
  cluster_arrived_ = 0;
  cluster_phase_ = 0;
  for (int rank = 0; rank < cluster_; ++rank) start_block(rank, first_block + static_cast<uint64_t>(rank));
  block_ = nullptr;
  threadIdx = {0, 0, 0};
  Block& first = blocks_[seed_ != 0 && cluster_ > 1 ? random() % static_cast<uint32_t>(cluster_) : 0];
  enter(first, first.ready.take(0));
  switch_context(&main_, threads_[current_].context);
  for (int rank = 0; rank < cluster_ && problem_[0] == '\0'; ++rank) {
    const Block& b = blocks_[rank];
    for (const char* p = b.smem + smem_bytes_; p != b.smem_end; ++p)
      if (*p != '\xff') {
        snprintf(problem_, sizeof problem_, "block %u,%u,%u wrote shared offset %td, but has %zu bytes", b.index.x,
                 b.index.y, b.index.z, p - b.smem, smem_bytes_);
        break;
      }
  }
}

inline void Engine::on_fault(int, siginfo_t* info, void*) {
  Engine& engine = get();
  const char* address = static_cast<const char*>(info->si_addr);
  char what[64];
  snprintf(what, sizeof what, "address %p, which is not mapped", info->si_addr);
  for (int rank = 0; rank < engine.cluster_; ++rank) {
    const Block& b = engine.blocks_[rank];
    if (address >= b.smem_end - kSmemRegion - kGuard && address < b.smem_end + kGuard)
      snprintf(what, sizeof what, "shared offset %td of %zu bytes", address - b.smem, engine.smem_bytes_);
  }
  snprintf(engine.problem_, sizeof engine.problem_, "access to %s [block %u,%u,%u thread %d]", what, blockIdx.x,
           blockIdx.y, blockIdx.z, engine.current_ % kMaxThreads);
  siglongjmp(engine.escape_, 1);
}

inline const char* Engine::run(dim3 grid, int cluster, int threads, size_t smem_bytes, std::function<void()> body) {
  problem_[0] = '\0';
  const size_t limit = smem_limit(setting("HF_LINATTN_EMULATED_CAPABILITY", 90));
  if (threads < 1 || threads > kMaxThreads || smem_bytes > limit || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
      grid.y > 65535 || grid.z > 65535 || cluster < 1 || cluster > kMaxCluster ||
      grid.x % static_cast<unsigned>(cluster) != 0) {
    snprintf(problem_, sizeof problem_,
             "launch of %u x %u x %u blocks (clusters of %d) of %d threads with %zu bytes of shared memory: invalid "
             "(%zu bytes at most)",
             grid.x, grid.y, grid.z, cluster, threads, smem_bytes, limit);
    return problem_;
  }
  body_ = std::move(body);
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  threads_in_block_ = threads;
  smem_bytes_ = smem_bytes;
  seed_ = setting("HF_LINATTN_EMULATED_SEED", 0);
  random_ = 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(seed_ + 1);
  cluster_ = cluster;
  std::vector<uint64_t> clusters(uint64_t{grid.x} / static_cast<unsigned>(cluster) * grid.y * grid.z);
  std::iota(clusters.begin(), clusters.end(), uint64_t{0});
  if (seed_ != 0)
    for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[random() % i]);

  // A wild access ends the launch, not the process: the handler runs on its own stack, since a fiber's may be full.
  static std::vector<char> fault_stack(64 * 1024);
  stack_t alternative = {}, old_stack = {};
  alternative.ss_sp = fault_stack.data();
  alternative.ss_size = fault_stack.size();
  struct sigaction action = {}, old_segv = {}, old_bus = {};
  action.sa_sigaction = &on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&alternative, &old_stack);
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(escape_, 1) == 0)
    for (size_t i = 0; i < clusters.size() && problem_[0] == '\0'; ++i)
      run_cluster(clusters[i] * static_cast<uint64_t>(cluster));
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  body_ = nullptr;
  return problem_[0] == '\0' ? nullptr : problem_;
}

inline const char* run_kernel(dim3 grid, int cluster, int threads, size_t smem_bytes, std::function<void()> body) {
  return Engine::get().run(grid, cluster, threads, smem_bytes, std::move(body));
}

// 128-byte swizzle: bits 4-6 of the address are xored with bits 7-9.
inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) * kSwizzleChunk); }

inline void Engine::finish(const TensorCopy& copy) {
  Block& block = blocks_[copy.rank];
  const CUtensorMap& map = copy.map;
  const int64_t* at = copy.at;
  for (int row = 0; row < map.box_tokens; ++row) {
    const int64_t token = at[2] + row;
    const bool inside = at[1] >= 0 && at[1] < map.dims[1] && token >= 0 && token < map.dims[2] && at[3] >= 0 &&
                        at[3] < map.dims[3];
    const char* source = map.base + at[1] * map.strides[0] + token * map.strides[1] + at[3] * map.strides[2];
    for (uint32_t byte = 0; byte < kRowBytes; byte += static_cast<uint32_t>(map.element_bytes)) {
      const int64_t column = at[0] + byte / map.element_bytes;
      const uint32_t offset = swizzle(copy.smem + static_cast<uint32_t>(row) * kRowBytes + byte) - kWindow;
      char* target = block.smem + offset;
      if (inside && column >= 0 && column < map.dims[0])
        memcpy(target, source + column * map.element_bytes, static_cast<size_t>(map.element_bytes));
      else
        memset(target, 0, static_cast<size_t>(map.element_bytes));
      memcpy(block.async_smem.data() + offset, target, static_cast<size_t>(map.element_bytes));
    }
  }
  arrive(copy.rank, copy.bar, 0, -static_cast<int64_t>(map.box_tokens) * kRowBytes);
}

// The asynchronous proxy sees the store only after a later fence_proxy_async of the block that it goes to.
inline void Engine::finish(const Signal& signal) {
  Block& block = blocks_[signal.rank];
  publish(block);
  if (signal.stores) memcpy(block.smem + (signal.smem - kWindow), &signal.value, sizeof signal.value);
  mbarrier(signal.rank, signal.bar, "mbarrier_arrive").has_remote_signals |= signal.from_other_block;
  arrive(signal.rank, signal.bar, signal.stores ? 0 : 1, signal.stores ? -int64_t{sizeof signal.value} : 0);
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

inline float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) {
      const __half_raw raw = {static_cast<unsigned short>(i)};
      all[i] = __half2float(__half(raw));
    }
    return all;
  }();
  return table[bits];
}

template <class T>
constexpr float (*operand_to_float())(uint16_t) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "operands are bfloat16 or half");
  return std::is_same_v<T, __nv_bfloat16> ? &bf16_to_float : &half_to_float;
}

// Tensor cores drop what tf32 does not hold.
inline float tf32_to_float(uint32_t bits) {
  bits &= 0xffffe000u;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Two elements of a packed register of the A fragment of lane l (16 x 16): rows l/4 (+ 8 in registers 1 and 3), columns
// 2 (l % 4) (+ 8 in registers 2 and 3).
inline void unpack_a(float (&a)[16][16], int lane, const uint32_t (&r)[4], float (*to_float)(uint16_t)) {
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + half] = to_float(static_cast<uint16_t>(r[i] >> 16 * half));
}

// Address of element (k, n) of wgmma's B operand; the hardware's rule for 128-byte swizzle.
inline uint32_t wgmma_b_address(uint64_t descriptor, bool transposed, uint32_t k, uint32_t n) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t linear = transposed ? k / 8 * stride + k % 8 * kRowBytes + n / 64 * leading + n % 64 * 2
                                     : n / 8 * stride + n % 8 * kRowBytes + k * 2;
  return swizzle(start + linear);
}

// d += or = a b for the rows of one warp.
inline void finish_wgmma(Engine& engine, const Wgmma& w) {
  std::vector<float> b(w.b.size());
  for (uint32_t k = 0; k < 16; ++k)
    for (uint32_t n = 0; n < static_cast<uint32_t>(w.columns); ++n) {
      const size_t i = k * static_cast<size_t>(w.columns) + n;
      uint16_t now;
      memcpy(&now, engine.at(wgmma_b_address(w.descriptor, w.transposed, k, n), 2, 2, "wgmma"), sizeof now);
      if (now != w.b[i]) engine.fail("wgmma: element (k %u, n %u) of B was overwritten before wgmma_wait", k, n);
      b[i] = w.to_float(now);
    }
  std::vector<float> row(static_cast<size_t>(w.columns));
  for (int r = 0; r < 16; ++r) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < w.columns; ++n)
        row[static_cast<size_t>(n)] += w.a[r][k] * b[static_cast<size_t>(k * w.columns + n)];
    for (int n = 0; n < w.columns; ++n) {
      float& d = w.d[r % 8 * 4 + n % 8 / 2][n / 8 * 4 + r / 8 * 2 + n % 2];
      d = w.accumulate ? d + row[static_cast<size_t>(n)] : row[static_cast<size_t>(n)];
    }
  }
}

template <class T, class Source>
T shuffle(const char* what, unsigned mask, T value, int argument, int width, Source source) {
  static_assert(std::is_trivially_copyable_v<T>, "a shuffle moves bits");
  Engine& engine = Engine::get();
  if (mask != 0xffffffffu) engine.fail("%s: mask %#x; only full warps are supported", what, mask);
  struct Operand {
    T value, result;
    int from;
  } operand = {value, value, source(engine.lane(), argument, width)};
  engine.meet_warp(what, 0, &operand, [](void** lanes) {
    for (int i = 0; i < kWarp; ++i) {
      Operand* mine = static_cast<Operand*>(lanes[i]);
      if (mine != nullptr && lanes[mine->from] != nullptr)
        mine->result = static_cast<Operand*>(lanes[mine->from])->value;
    }
  });
  return operand.result;
}

template <bool kTranspose, bool kStore>
void move_matrices(const char* what, uint32_t address, uint32_t (&r)[4]) {
  struct Operand {
    char* row;
    uint32_t* r;
  } operand = {Engine::get().at(address, 16, 16, what), r};
  Engine::get().meet_warp(what, 0, &operand, [](void** lanes) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 8; ++i) {
        const int matrix = i / 2, half = i % 2;
        const int major = lane / 4, minor = lane % 4 * 2 + half;
        const int row = kTranspose ? minor : major, column = kTranspose ? major : minor;
        char* element = static_cast<Operand*>(lanes[matrix * 8 + row])->row + column * 2;
        char* part = reinterpret_cast<char*>(static_cast<Operand*>(lanes[lane])->r + matrix) + half * 2;
        memcpy(kStore ? element : part, kStore ? part : element, 2);
      }
  });
}

inline void do_copy(const Copy& c) {
  char* target = Engine::get().at(c.smem, 16, 16, "cp_async_16");
  memcpy(target, c.global, static_cast<size_t>(c.valid_bytes));
  memset(target + c.valid_bytes, 0, 16 - static_cast<size_t>(c.valid_bytes));
}

}  // namespace emulation

namespace ptx {

using emulation::Engine;

inline char* dynamic_smem() { return Engine::get().smem(); }

inline uint32_t smem_address(const void* pointer) {
  Engine& engine = Engine::get();
  const ptrdiff_t offset = static_cast<const char*>(pointer) - engine.smem();
  if (offset < 0 || static_cast<size_t>(offset) > engine.smem_bytes())
    engine.fail("smem_address: %p is no address of shared memory", pointer);
  return emulation::kWindow + static_cast<uint32_t>(offset);
}

template <int n>
void keep(float (&x)[n]) {
  asm volatile("" : : "r"(x) : "memory");
}
template <int n>
void keep(uint32_t (&x)[n]) {
  asm volatile("" : : "r"(x) : "memory");
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  emulation::move_matrices<false, false>("ldmatrix_x4", address, r);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  emulation::move_matrices<true, false>("ldmatrix_x4_trans", address, r);
}
inline void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  uint32_t copy[4] = {r[0], r[1], r[2], r[3]};
  emulation::move_matrices<false, true>("stmatrix_x4", address, copy);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    float* d;
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
  } operand = {d, &a, &b};
  Engine::get().meet_warp("mma_m16n8k16", 0, &operand, [](void** lanes) {
    constexpr auto to_float = emulation::operand_to_float<T>();
    float left[16][16], right[16][8];
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const Operand& o = *static_cast<Operand*>(lanes[lane]);
      emulation::unpack_a(left, lane, *o.a, to_float);
      for (int i = 0; i < 4; ++i)
        right[lane % 4 * 2 + i / 2 * 8 + i % 2][lane / 4] =
            to_float(static_cast<uint16_t>((*o.b)[i / 2] >> 16 * (i % 2)));
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += left[row][k] * right[k][n];
      for (int n = 0; n < 8; ++n) static_cast<Operand*>(lanes[row % 8 * 4 + n / 2])->d[row / 8 * 2 + n % 2] += sum[n];
    }
  });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } operand = {d, a, b};
  Engine::get().meet_warp("mma_m16n8k8_tf32", 0, &operand, [](void** lanes) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const Operand& o = *static_cast<Operand*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = emulation::tf32_to_float(o.a[i]);
      for (int i = 0; i < 2; ++i) right[lane % 4 + i * 4][lane / 4] = emulation::tf32_to_float(o.b[i]);
    }
    for (int row = 0; row < 16; ++row)
      for (int n = 0; n < 8; ++n) {
        float sum = 0;
        for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][n];
        static_cast<Operand*>(lanes[row % 8 * 4 + n / 2])->d[row / 8 * 2 + n % 2] += sum;
      }
  });
}

inline uint32_t fma_bf16x2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [shift](uint32_t pair) { return double{emulation::bf16_to_float(static_cast<uint16_t>(pair >> shift))}; };
    const __nv_bfloat16_raw raw = __double2bfloat16(part(x) * part(y) + part(z));
    result |= static_cast<uint32_t>(raw.x) << shift;
  }
  return result;
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;  // to nearest, ties away from zero
  return bits & 0xffffe000u;
}

inline void cp_async_16(uint32_t smem, const void* global, int valid_bytes) {
  Engine& engine = Engine::get();
  engine.at(smem, 16, 16, "cp_async_16");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) engine.fail("cp_async_16: source %p is not aligned", global);
  if (valid_bytes < 0 || valid_bytes > 16) engine.fail("cp_async_16: %d valid bytes", valid_bytes);
  const emulation::Copy copy = {smem, global, valid_bytes};
  if (engine.by_chance())
    emulation::do_copy(copy);
  else
    engine.self().copies.push_back(copy);
}
inline void cp_async_commit() {
  emulation::Thread& t = Engine::get().self();
  t.copy_groups.push_back(std::move(t.copies));
  t.copies.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = Engine::get().self().copy_groups;
  while (groups.size() > kPending) {
    for (const emulation::Copy& copy : groups.front()) emulation::do_copy(copy);
    groups.erase(groups.begin());
  }
}

inline void named_barrier_sync(int id, int threads) { Engine::get().meet_block(Engine::kNamedBarrier, id, threads); }

inline void mbarrier_init(uint32_t bar, uint32_t count) { Engine::get().init_mbarrier(bar, count); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t bar) { Engine::get().arrive(Engine::get().rank(), bar, 1, 0); }
inline void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  Engine::get().arrive(Engine::get().rank(), bar, 1, bytes);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity) { Engine::get().wait_mbarrier(bar, parity, false); }
inline void mbarrier_wait_cluster(uint32_t bar, uint32_t parity) { Engine::get().wait_mbarrier(bar, parity, true); }

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline float reciprocal(float x) { return 1.f / x; }
inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(Engine::get().rank()); }
inline uint32_t map_shared_rank(uint32_t address, uint32_t rank) { return Engine::get().map_rank(address, rank); }

inline void mbarrier_arrive_remote(uint32_t remote_bar) {
  Engine& engine = Engine::get();
  const int rank = engine.find_block(remote_bar, 8, 8, "mbarrier_arrive_remote").rank;
  engine.mbarrier(rank, remote_bar, "mbarrier_arrive_remote");
  engine.start({rank, false, rank != engine.rank(), remote_bar, 0, 0});
}

inline void st_async(uint32_t remote_address, float value, uint32_t remote_bar) {
  Engine& engine = Engine::get();
  const int rank = engine.find_block(remote_address, 4, 4, "st_async").rank;
  if (engine.find_block(remote_bar, 8, 8, "st_async").rank != rank)
    engine.fail("st_async: the address and the mbarrier are in different blocks");
  engine.mbarrier(rank, remote_bar, "st_async");
  engine.start({rank, true, rank != engine.rank(), remote_bar, remote_address, value});
}

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tma_load_4d_multicast(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3,
                                  uint16_t mask) {
  Engine& engine = Engine::get();
  if (mask == 0 || mask >> engine.cluster_size() != 0)
    engine.fail("tma_load_4d: mask %#x; the cluster has %d blocks", mask, engine.cluster_size());
  engine.at(smem, static_cast<uint32_t>(map->box_tokens) * emulation::kRowBytes, emulation::kRowBytes, "tma_load_4d");
  for (int rank = 0; rank < engine.cluster_size(); ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    engine.mbarrier(engine.running(rank, "tma_load_4d").rank, bar, "tma_load_4d");
    engine.start({*map, rank, smem, bar, {c0, c1, c2, c3}});
  }
}
inline void tma_load_4d(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3) {
  tma_load_4d_multicast(smem, map, bar, c0, c1, c2, c3, static_cast<uint16_t>(1 << cluster_rank()));
}
inline void tma_load_4d_kept(uint32_t smem, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3) {
  tma_load_4d(smem, map, bar, c0, c1, c2, c3);
}

inline void fence_proxy_async() { Engine::get().fence_async(); }

inline uint64_t wgmma_descriptor(uint32_t smem, uint32_t column_stride = 16) {
  constexpr uint64_t kRowGroupBytes = 1024, kSwizzle128 = 1;
  return static_cast<uint64_t>((smem & 0x3ffff) >> 4) | static_cast<uint64_t>(column_stride >> 4) << 16 |
         (kRowGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

inline void wgmma_fence() { Engine::get().self().wgmma_fenced = true; }

template <class T, int N, bool kTransB>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
  static_assert(N == 8 || N == 16 || N == 24 || N == 32 || N == 40 || N == 48 || N == 64 || N == 96 || N == 128,
                "no operand list for this N");
  Engine& engine = Engine::get();
  if (!engine.self().wgmma_fenced) engine.fail("wgmma: no wgmma_fence since the last wgmma_commit or wgmma_wait");
  if (desc_b >> 62 != 1 || (desc_b >> 49 & 7) != 0) engine.fail("wgmma: descriptor %#llx", (unsigned long long)desc_b);
  if (kTransB && N > 64 && (desc_b >> 16 & 0x3fff) < 8)
    engine.fail("wgmma: N %d needs the descriptor's column_stride", N);
  struct Operand {
    float* d;
    const uint32_t (*a)[4];
    bool accumulate;
  } operand = {d, &a, accumulate};
  engine.meet_warp("wgmma_rs", desc_b, &operand, [&](void** lanes) {
    emulation::Wgmma w = {};
    w.columns = N;
    w.transposed = kTransB;
    w.accumulate = accumulate;
    w.descriptor = desc_b;
    w.to_float = emulation::operand_to_float<T>();
    w.b.resize(16 * N);
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const Operand& o = *static_cast<Operand*>(lanes[lane]);
      emulation::unpack_a(w.a, lane, *o.a, w.to_float);
      w.d[lane] = o.d;
      if (o.accumulate != accumulate) engine.fail("wgmma: lanes disagree about accumulate");
    }
    engine.log_wgmma(desc_b, N * 4 + kTransB * 2 + accumulate);
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t n = 0; n < N; ++n) {
        const char* p = engine.at(emulation::wgmma_b_address(desc_b, kTransB, k, n), 2, 2, "wgmma");
        if (memcmp(p, engine.async_view(p), 2) != 0)
          engine.fail("wgmma: element (k %u, n %u) of B was written without fence_proxy_async", k, n);
        memcpy(&w.b[k * N + n], p, 2);
      }
    engine.warp().wgmmas.push_back(std::move(w));
  });
}

// a, of which every warp has 16 of the 64 rows, is read when the product is issued.
template <class T>
void wgmma_ss(float (&d)[32], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  Engine& engine = Engine::get();
  if (desc_a >> 62 != 1 || (desc_a >> 49 & 7) != 0) engine.fail("wgmma: descriptor %#llx", (unsigned long long)desc_a);
  uint32_t a[4] = {};
  const uint32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * 16;
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = first_row + lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8 + half;
      const char* p = engine.at(emulation::wgmma_b_address(desc_a, false, column, row), 2, 2, "wgmma");
      if (memcmp(p, engine.async_view(p), 2) != 0)
        engine.fail("wgmma: element (row %u, k %u) of A was written without fence_proxy_async", row, column);
      uint16_t bits;
      memcpy(&bits, p, 2);
      a[i] |= static_cast<uint32_t>(bits) << 16 * half;
    }
  wgmma_rs<T, 64, false>(d, a, desc_b, accumulate);
}

inline void wgmma_commit() {
  Engine& engine = Engine::get();
  engine.self().wgmma_fenced = false;
  if (engine.lane() != 0) return;
  emulation::Warp& w = engine.warp();
  w.wgmma_groups.push_back(std::move(w.wgmmas));
  w.wgmmas.clear();
}

template <int kPending>
void wgmma_wait() {
  Engine& engine = Engine::get();
  engine.self().wgmma_fenced = false;
  engine.meet_warp("wgmma_wait", kPending, nullptr, [&](void**) {
    auto& groups = engine.warp().wgmma_groups;
    while (groups.size() > kPending) {
      for (const emulation::Wgmma& w : groups.front()) emulation::finish_wgmma(engine, w);
      groups.erase(groups.begin());
    }
  });
}

inline void cluster_arrive() { Engine::get().arrive_cluster(); }
inline void launch_dependents() {}  // one kernel at a time
inline void wait_for_previous() {}
inline void cluster_wait() { Engine::get().wait_cluster(); }

template <int kRegisters>
void register_alloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24 to 256 by 8");
}
template <int kRegisters>
void register_dealloc() {
  register_alloc<kRegisters>();
}

}  // namespace ptx
}  // namespace hf_linattn

// What CUDA declares without a header.

inline void __syncthreads() {
  auto& engine = hf_linattn::emulation::Engine::get();
  engine.meet_block(engine.kSyncThreads, 0, engine.live());
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  auto& engine = hf_linattn::emulation::Engine::get();
  if (mask != 0xffffffffu) engine.fail("__syncwarp: mask %#x; only full warps are supported", mask);
  engine.meet_warp("__syncwarp", 0, nullptr, [](void**) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize) {
  return hf_linattn::emulation::shuffle("__shfl_sync", mask, value, from, width,
                                        [](int lane, int x, int w) { return lane / w * w + x % w; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return hf_linattn::emulation::shuffle("__shfl_xor_sync", mask, value, lanes, width, [](int lane, int x, int w) {
    return (lane ^ x) < lane / w * w + w ? lane ^ x : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  return hf_linattn::emulation::shuffle(
      "__shfl_up_sync", mask, value, static_cast<int>(distance), width,
      [](int lane, int x, int w) { return lane - x < lane / w * w ? lane : lane - x; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = warpSize) {
  return hf_linattn::emulation::shuffle(
      "__shfl_down_sync", mask, value, static_cast<int>(distance), width,
      [](int lane, int x, int w) { return lane + x < lane / w * w + w ? lane + x : lane; });
}

inline void __threadfence() {}

inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  const unsigned long long before = *p;
  *p += x;
  return before;
}

[[noreturn]] inline void __trap() { hf_linattn::emulation::Engine::get().fail("__trap"); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> ((selector >> 4 * i & 7) * 8) & 0xff) << 8 * i;
  return result;
}
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }

extern "C" inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

#endif  // HF_LINATTN_EMULATION_H_
