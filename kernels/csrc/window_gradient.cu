// dq and dk of the softmax part of window_linear_attention; formulas in window_gradient.h.
//
// A CTA has 64 rows of one head, queries for dq and keys for dk, and walks over the chunks of 64 sources that the
// window lets them see; chunks begin where row tiles do, so that there are ceil((w - 1) / 64) beside the rows' own.
// Warp w owns rows 16w .. 16w+15: it forms s and do.v for 32 sources at a time (16 where operands are float), which
// become ds in registers, the left operand of the product that adds to the gradient. It leaves out sources that no row
// of its own sees. dk sums over the query heads of its group in one loop, in one order: no atomics.
//
//   kernel  x  x2  y  y2  out   a row's L and delta
//   dq      q  do  k  v   dq    in registers
//   dk      k  v   q  do  dk    of the sources, in shared memory
#include "window_gradient.h"

#include <float.h>

#include <algorithm>

#include "launch.cuh"
#include "tile_copy.cuh"

namespace hf_linattn {
namespace {

constexpr int kWarps = kWarpgroupThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A row tile is a segment of one chunk: find_segment finds it.
struct RowTileArgs : WindowGradientArgs {
  int num_slots;
  int64_t segment_tokens;
};

// All dimensions are padded to kDim.
template <class Engine, int kDim, bool kIsKey>
struct WindowGradient {
  using Element = typename Engine::Element;
  using FragmentA = typename Engine::FragmentA;
  using Tile = typename Engine::template Tile<kChunk, kDim>;
  static constexpr int kSources = Engine::kScoreColumns / 2;  // whose scores, s and do.v, are in registers at a time
  static constexpr bool kIsBf16 = std::is_same_v<Element, __nv_bfloat16>;

  // Shared memory: x, x2, the stages of y and y2; then two numbers of each source in work: L and delta of a query, or
  // whether a key is valid.
  static constexpr int kPairBytes = 2 * Tile::kBytes, kNumbers = 2 * kChunk;
  static constexpr int smem_bytes(int num_stages) {
    return (1 + num_stages) * kPairBytes + kNumbers * static_cast<int>(sizeof(float));
  }
  static_assert(kNumbers == kWarpgroupThreads, "each thread brings one number");

  static constexpr int kUnit = 16 / sizeof(Element), kRowUnits = kDim / kUnit / 4;  // of a row: of each of four lanes
  struct alignas(16) Unit {
    Element e[kUnit];
  };

  // A chunk of sources: of which head of the group, in which stage.
  struct Sources {
    int chunk, member, stage;
  };

  const RowTileArgs& args;
  const int batch, head, num_stages;  // head: of x and out
  const uint32_t base;
  const int lane, warp, g, t;
  const int sequence_begin, sequence_end;
  const int own_chunk;          // of the rows, counted from the sequence's begin, as the chunks of sources are
  int first_chunk, last_chunk;  // of sources; for dk, of each head of the group in turn
  float lse[2], delta[2];       // of this thread's two rows, for dq; L in units of log2

  __device__ __forceinline__ WindowGradient(const RowTileArgs& args, const Segment& rows, int head, int num_stages)
      : args(args),
        batch(rows.batch),
        head(head),
        num_stages(num_stages),
        base(ptx::smem_address(ptx::dynamic_smem())),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        sequence_begin(bound(args, rows, 0)),
        sequence_end(bound(args, rows, 1)),
        own_chunk((static_cast<int>(rows.begin) - sequence_begin) / kChunk) {
    const int reach = (args.window - 1 + kChunk - 1) / kChunk;  // chunks of the window beside the rows' own
    const int last = (sequence_end - sequence_begin - 1) / kChunk;
    first_chunk = kIsKey ? own_chunk : max(own_chunk - reach, 0);
    last_chunk = kIsKey ? min(own_chunk + reach, last) : own_chunk;
  }

  // dq (dk) of the rows; with dq the numbers of each of them.
  __device__ __forceinline__ void run() {
    const uint32_t x = base, x2 = base + Tile::kBytes;
    copy_rows<Element, Tile, kDim>(x, kIsKey ? args.k : args.q, batch, head, first_row(), sequence_end);
    copy_rows<Element, Tile, kDim>(x2, kIsKey ? args.v : args.d_o, batch, head, first_row(), sequence_end);
    const bool is_ahead = num_stages > 1;
    Sources now = {first_chunk, 0, 0};
    float number = is_ahead ? load(now) : 0.f;  // of the sources loaded last
    if (!kIsKey) start_rows();
    float out[kDim / 2];
    Engine::start(out);
#pragma unroll 1
    while (now.member < members()) {
      __syncthreads();  // the stage to load, and the numbers, are read
      Sources next = now;
      if (is_ahead) advance(next);
      const bool is_loading = next.member < members();
      const float next_number = is_loading ? load(next) : 0.f;
      if (is_ahead && is_loading) ptx::cp_async_wait<1>();
      else ptx::cp_async_wait<0>();
      const float arrived = is_ahead ? number : next_number;
      source_numbers()[threadIdx.x] = kIsKey && threadIdx.x < kChunk ? arrived * kLog2E : arrived;
      number = next_number;
      __syncthreads();
      add_sources(out, now);
      advance(now);
    }
    write_out(out, x);
  }

 private:
  // Where the sequence of the rows begins, or ends.
  static __device__ __forceinline__ int bound(const RowTileArgs& args, const Segment& rows, int is_end) {
    if (args.cu_seqlens == nullptr) return static_cast<int>(is_end * args.tokens);
    return static_cast<int>(sequence_bound(args, rows.sequence + is_end));
  }
  __device__ __forceinline__ float* source_numbers() const {
    return &shared_at<float>(base + (1 + num_stages) * kPairBytes);
  }
  __device__ __forceinline__ int members() const { return kIsKey ? args.num_heads / args.num_kv_heads : 1; }
  __device__ __forceinline__ int first_row() const { return sequence_begin + hidden(own_chunk) * kChunk; }
  // Of this thread's i-th row.
  __device__ __forceinline__ int row_token(int i) const { return first_row() + 16 * warp + g + 8 * i; }
  __device__ __forceinline__ bool is_inside(int i) const { return row_token(i) < sequence_end; }
  // Where the numbers of a query are, in arrays [B,H,T].
  __device__ __forceinline__ int64_t number_at(int query_head, int token) const {
    return (static_cast<int64_t>(batch) * args.num_heads + query_head) * args.tokens + token;
  }
  static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
  }

  __device__ __forceinline__ void advance(Sources& at) const {
    if (++at.chunk > last_chunk) at.chunk = first_chunk, ++at.member;
    if (num_stages > 1) at.stage ^= 1;
  }
  __device__ __forceinline__ uint32_t tiles(const Sources& at) const { return base + (1 + at.stage) * kPairBytes; }

  // Starts the copies of the tiles. Returns this thread's number, which goes to shared memory when they have come.
  __device__ __forceinline__ float load(const Sources& at) const {
    const int group = args.num_heads / args.num_kv_heads;
    const int source_head = kIsKey ? head * group + at.member : head / group;
    const int first = sequence_begin + at.chunk * kChunk;
    copy_rows<Element, Tile, kDim>(tiles(at), kIsKey ? args.q : args.k, batch, source_head, first, sequence_end);
    copy_rows<Element, Tile, kDim>(tiles(at) + Tile::kBytes, kIsKey ? args.d_o : args.v, batch, source_head, first,
                                   sequence_end);
    ptx::cp_async_commit();
    const int token = first + static_cast<int>(threadIdx.x % kChunk);
    const bool is_inside = token < sequence_end, is_second = threadIdx.x >= kChunk;
    if constexpr (kIsKey) {
      // A query beyond the sequence has do = 0, and delta = 0: its ds are 0.
      return is_inside ? (is_second ? args.delta : args.lse)[number_at(source_head, token)] : 0.f;
    }
    // As it is: nothing waits for it here.
    return __uint_as_float(args.key_valid != nullptr && is_inside ? args.key_valid[batch * args.tokens + token] : 0);
  }

  __device__ __forceinline__ const Element* query_row(const Rows& of, int token) const {
    return static_cast<const Element*>(of.data) + hidden(batch) * of.batch_stride + hidden(head) * of.head_stride +
           token * of.token_stride;
  }
  static __device__ __forceinline__ bool has_units(const Rows& rows) {
    const int64_t strides = rows.batch_stride | rows.head_stride | rows.token_stride;
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && (strides | rows.dim) % kUnit == 0;
  }

  // This lane's share of do . o of a query, while the tiles are under way.
  __device__ __forceinline__ float partial_delta(int token) const {
    const Element *o = query_row(args.o, token), *d_o = query_row(args.d_o, token);
    float sum = 0.f;
    if (has_units(args.o) && has_units(args.d_o)) {
      Unit x[kRowUnits], y[kRowUnits];
#pragma unroll
      for (int u = 0; u < kRowUnits; ++u) {
        const int column = (4 * u + t) * kUnit;
        x[u] = y[u] = {};
        if (column >= args.o.dim) continue;
        x[u] = *reinterpret_cast<const Unit*>(o + column);
        y[u] = *reinterpret_cast<const Unit*>(d_o + column);
      }
#pragma unroll
      for (int u = 0; u < kRowUnits; ++u) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) sum += static_cast<float>(x[u].e[e]) * static_cast<float>(y[u].e[e]);
      }
    } else {
#pragma unroll 1
      for (int c = t; c < args.o.dim; c += 4) sum += static_cast<float>(o[c]) * static_cast<float>(d_o[c]);
    }
    return sum;
  }

  // L and delta of this thread's rows; what the call for dk and the far part read of them.
  __device__ __forceinline__ void start_rows() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = row_token(i);
      const int64_t at = number_at(head, token);
      const bool is_inside = token < sequence_end;
      lse[i] = is_inside ? args.lse[at] : 0.f;
      delta[i] = quad_sum(is_inside ? partial_delta(token) : 0.f);
      if (t != 0 || !is_inside) continue;
      constexpr float kMostWeight = 1.f / FLT_MIN;
      const float weight = expf((args.log_scale == nullptr ? 0.f : args.log_scale[head]) - lse[i]);
      args.delta[at] = delta[i];
      args.far_weight[at] = weight > kMostWeight ? kMostWeight : weight;  // a NaN stays one
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) lse[i] *= kLog2E;
  }

  // out += ds y over a chunk of sources.
  __device__ __forceinline__ void add_sources(float (&out)[kDim / 2], const Sources& sources) {
    const uint32_t y = tiles(sources);
    const float* const numbers = source_numbers();
    const bool with_validity = args.key_valid != nullptr;
    bool row_valid[2] = {true, true};
    if (kIsKey && with_validity) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_valid[i] = is_inside(i) && args.key_valid[batch * args.tokens + row_token(i)] != 0;
      }
    }
#pragma unroll 1
    for (int column = 0; column < kChunk; column += kSources) {
      // Tokens from the key to the query are `apart` for the first row and column, and steps of row and column more.
      const int between = (own_chunk - sources.chunk) * kChunk + 16 * warp - column;
      const int apart = kIsKey ? -between : between;
      constexpr int kLeast = kIsKey ? -15 : -(kSources - 1), kMost = kIsKey ? kSources - 1 : 15;
      if (apart + kMost < 0 || apart + kLeast >= args.window) continue;  // nobody sees anybody
      const bool all_see = apart + kLeast >= 0 && apart + kMost < args.window && !with_validity;

      float s[kSources / 2], d[kSources / 2];
      multiply(s, d, y + column * Tile::kRowBytes);
      float factor = args.scale * kLog2E;
      if (args.softcap != 0.f) {
        const float inside = args.scale / args.softcap;
#pragma unroll
        for (int i = 0; i < kSources / 2; ++i) s[i] = tanhf(s[i] * inside);
        factor = args.softcap * kLog2E;
      }
#pragma unroll
      for (int i = 0; i < kSources / 2; ++i) {
        const int source = column + i / 4 * 8 + 2 * t + i % 2;
        const float log_sum = kIsKey ? numbers[source] : lse[i / 2 % 2];
        const float mean = kIsKey ? numbers[kChunk + source] : delta[i / 2 % 2];
        d[i] = ptx::exp2(s[i] * factor - log_sum) * (d[i] - mean);
      }
      if (!all_see) {
        // Of its columns each of this thread's two rows sees those from `low` on and before `high`.
        int low[2], high[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = g + 8 * i - 2 * t, near = kIsKey ? row - apart : row + apart;  // at its own token
          low[i] = kIsKey ? near : near - args.window + 1;
          high[i] = kIsKey ? near + (row_valid[i] ? args.window : 1) : near + 1;
        }
#pragma unroll
        for (int i = 0; i < kSources / 2; ++i) {
          const int row = i / 2 % 2, right = i / 4 * 8 + i % 2;
          if (right < low[row] || right >= high[row]) d[i] = 0.f;
        }
        if (!kIsKey && with_validity) {
#pragma unroll
          for (int i = 0; i < kSources / 2; ++i) {
            const int right = i / 4 * 8 + i % 2;
            const bool is_valid = __float_as_uint(numbers[column + 2 * t + right]) != 0;
            if (!is_valid && right != high[i / 2 % 2] - 1) d[i] = 0.f;
          }
        }
      }
      if (args.softcap != 0.f) {
#pragma unroll
        for (int i = 0; i < kSources / 2; ++i) d[i] *= 1.f - s[i] * s[i];
      }
#pragma unroll
      for (int k = 0; k < kSources / 16; ++k) {
        const FragmentA ds = Engine::pack_a(reinterpret_cast<const float(&)[8]>(d[8 * k]));
        Engine::template gemm_kn<kDim, Tile>(out, ds, y, column + 16 * k, true);
      }
    }
  }

  // s = x y^T and d = x2 y2^T: this warp's rows by kSources rows of y from `y` on.
  __device__ __forceinline__ void multiply(float (&s)[kSources / 2], float (&d)[kSources / 2], uint32_t y) const {
    constexpr int kUnroll = kIsBf16 ? 4 : 1;
    Engine::start(s);
    Engine::start(d);
#pragma unroll(kUnroll)
    for (int k = 0; k < kDim / 16; ++k) {
      FragmentA a;
      Engine::template load_a<Tile>(a, base, 16 * warp, 16 * k);
      Engine::template gemm_nk<kSources, Tile>(s, a, y, 16 * k, true);
      Engine::template load_a<Tile>(a, base + Tile::kBytes, 16 * warp, 16 * k);
      Engine::template gemm_nk<kSources, Tile>(d, a, y + Tile::kBytes, 16 * k, true);
    }
  }

  // 16-bit rows leave in one piece, through this warp's own rows of x, which are read.
  __device__ __forceinline__ void write_out(float (&out)[kDim / 2], uint32_t x) {
    const Rows& to = kIsKey ? args.dk : args.dq;
    const int valid = min(sequence_end - first_row(), kChunk);
    Element* const first = static_cast<Element*>(to.data) + hidden(batch) * to.batch_stride +
                           hidden(head) * to.head_stride + first_row() * to.token_stride;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= args.scale;
    if constexpr (kIsBf16) {
      __syncwarp();
      Engine::template store<kDim, Tile>(x, 16 * warp, 0, out, 0);
      __syncwarp();
      const bool is_aligned = (reinterpret_cast<uintptr_t>(first) | to.token_stride * 2 | to.dim * 2) % 16 == 0;
      constexpr int kUnits = kDim / 8;
      if (is_aligned) {
#pragma unroll
        for (int i = 0; i < 16 * kUnits; i += 32) {
          const int row = 16 * warp + (i + lane) / kUnits, column = (i + lane) % kUnits * 8;
          if (row < valid && column < to.dim) {
            *reinterpret_cast<uint4*>(first + row * to.token_stride + column) =
                shared_at<uint4>(x + Tile::offset(row, column));
          }
        }
      } else {
#pragma unroll 1
        for (int i = lane; i < 16 * kDim; i += 32) {
          const int row = 16 * warp + i / kDim, column = i % kDim;
          if (row < valid && column < to.dim) {
            first[row * to.token_stride + column] = shared_at<Element>(x + Tile::offset(row, column));
          }
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp + g + 8 * half;
        if (row >= valid) continue;
        Element* const at = first + row * to.token_stride;
#pragma unroll
        for (int i = 2 * half; i < kDim / 2; i += i % 2 == 0 ? 1 : 3) {
          const int column = i / 4 * 8 + 2 * t + i % 2;
          if (column < to.dim) at[column] = static_cast<Element>(out[i]);
        }
      }
    }
  }
};

// Tokens behind the last packed sequence belong to none: what is written of them is zero. The slots of that sequence
// reach to the end of the tensors.
template <class Element, bool kIsKey>
__device__ __forceinline__ void clear_tail(const RowTileArgs& args, const Segment& rows, int head) {
  if (args.cu_seqlens == nullptr || rows.sequence != args.num_sequences - 1) return;
  const Rows& to = kIsKey ? args.dk : args.dq;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Element* const data = static_cast<Element*>(to.data) + head * to.head_stride;
  const int64_t tile_end = rows.begin + kChunk, end = tile_end < args.tokens ? tile_end : args.tokens;
  for (int64_t token = (rows.begin < rows.end ? rows.end : rows.begin) + warp; token < end; token += kWarps) {
    for (int c = lane; c < to.dim; c += 32) data[token * to.token_stride + c] = static_cast<Element>(0.f);
    if (kIsKey || lane != 0) continue;
    const int64_t at = head * args.tokens + token;
    args.delta[at] = args.far_weight[at] = 0.f;
  }
}

// Three blocks a processor where registers suffice: one waits for its tiles while others multiply.
template <class Engine, int kDim>
constexpr int kLeastBlocks = std::is_same_v<Engine, Bf16Mma> && kDim <= 128 ? 3 : 1;

template <class Engine, int kDim, bool kIsKey>
__global__ void __launch_bounds__(kWarpgroupThreads, kLeastBlocks<Engine, kDim>)
    window_gradient_kernel(const __grid_constant__ RowTileArgs args, int heads, int num_stages) {
  const int head = blockIdx.x % heads, index = blockIdx.x / heads;
  // A query tile has the more sources the later it is, a key tile the earlier: those with most begin first.
  const Segment rows = find_segment(args, kIsKey ? index : args.num_slots - 1 - index);
  clear_tail<typename Engine::Element, kIsKey>(args, rows, head);
  if (rows.begin >= rows.end) return;
  WindowGradient<Engine, kDim, kIsKey>(args, rows, head, num_stages).run();
}

// Two stages, unless only one leaves room for a second block.
template <class Work>
int stages_of(int limit) {
  constexpr int kReserved = 1024;  // bytes that a processor keeps of each block
  const auto blocks = [&](int num_stages) { return (limit + kReserved) / (Work::smem_bytes(num_stages) + kReserved); };
  return blocks(2) >= 2 || (blocks(2) == 1 && blocks(1) == 1) ? 2 : 1;
}

template <class Engine, int kDim, bool kIsKey>
int launch_window_gradient(const WindowGradientArgs& args, bool only_check, cudaStream_t stream) {
  using Work = WindowGradient<Engine, kDim, kIsKey>;
  const int limit = smem_limit(), num_stages = stages_of<Work>(limit), smem_bytes = Work::smem_bytes(num_stages);
  if (smem_bytes > limit) {
    return set_error("window gradient: dimensions up to %d in this dtype need %d bytes of shared memory a block, the "
                     "device has %d; use fewer dimensions or the PyTorch form", kDim, smem_bytes, limit);
  }
  if (only_check) return 0;
  // Tokens are counted in int.
  if (args.tokens > INT32_MAX - kChunk) {
    return set_error("window gradient: at most 2^31 - 65 tokens, got %lld; split the batch or the sequences",
                     static_cast<long long>(args.tokens));
  }
  const int64_t tiles = (args.tokens + kChunk - 1) / kChunk, heads = kIsKey ? args.num_kv_heads : args.num_heads;
  const bool is_packed = args.cu_seqlens != nullptr;
  const int64_t slots = is_packed ? args.tokens / kChunk + args.num_sequences : tiles * args.num_sequences;
  if (slots * heads > INT32_MAX) {
    return set_error("window gradient: %lld blocks are more than a grid holds; split the batch",
                     static_cast<long long>(slots * heads));
  }
  if (args.tokens == 0 || slots * heads == 0) return 0;
  RowTileArgs of_tiles = {};
  static_cast<WindowGradientArgs&>(of_tiles) = args;
  of_tiles.num_slots = static_cast<int>(slots);
  of_tiles.segment_tokens = kChunk;
  of_tiles.window = static_cast<int>(std::min<int64_t>(args.window, args.tokens));
  return launch(window_gradient_kernel<Engine, kDim, kIsKey>, dim3(static_cast<unsigned>(slots * heads)),
                kWarpgroupThreads, smem_bytes, stream, of_tiles, static_cast<int>(heads), num_stages);
}

template <class Engine, bool kIsKey>
int window_gradient_for(const WindowGradientArgs& args, bool only_check, cudaStream_t stream) {
  const int dim = std::max(args.q.dim, args.v.dim);
  if (dim <= 64) return launch_window_gradient<Engine, 64, kIsKey>(args, only_check, stream);
  if (dim <= 128) return launch_window_gradient<Engine, 128, kIsKey>(args, only_check, stream);
  if constexpr (std::is_same_v<Engine, Bf16Mma>) {
    if (dim <= kMaxDim) return launch_window_gradient<Engine, kMaxDim, kIsKey>(args, only_check, stream);
  }
  constexpr int kMost = std::is_same_v<Engine, Bf16Mma> ? kMaxDim : 128;
  return set_error("window gradient: dimensions in this dtype go up to %d, got %d; use the PyTorch form", kMost, dim);
}

template <bool kIsKey>
int window_gradient(int dtype, const WindowGradientArgs& args, bool only_check, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case HF_LINATTN_BF16: return window_gradient_for<Bf16Mma, kIsKey>(args, only_check, on);
    case HF_LINATTN_FP16: return window_gradient_for<Tf32Mma<1, __half>, kIsKey>(args, only_check, on);
    case HF_LINATTN_FP32: return window_gradient_for<Tf32Mma<3, float>, kIsKey>(args, only_check, on);
  }
  return set_error("window gradient: unknown dtype %d", dtype);
}

}  // namespace

int run_window_query_gradient(int dtype, const WindowGradientArgs& args, void* stream) {
  return window_gradient<false>(dtype, args, /*only_check=*/false, stream);
}

int run_window_key_gradient(int dtype, const WindowGradientArgs& args, void* stream) {
  return window_gradient<true>(dtype, args, /*only_check=*/false, stream);
}

int check_window_gradient(int dtype, int dim, int value_dim) {
  if (compute_capability() < 80) {
    return set_error("window gradient: the kernels need a device of compute capability 80, this one has %d; use the "
                     "PyTorch form", compute_capability());
  }
  WindowGradientArgs args = {};
  args.q.dim = dim;
  args.v.dim = value_dim;
  return window_gradient<false>(dtype, args, /*only_check=*/true, nullptr);  // dk needs the same
}

}  // namespace hf_linattn
