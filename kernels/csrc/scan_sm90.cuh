// The scans for Hopper (sm_90a). A CTA owns 64 columns of the output of one head and segment; its warpgroups share the work
// by role, so that what one chunk hands to the next is only the update of the state:
//
//   producer   asks the copy engine for the tiles of a chunk, into a ring of stages; another warp of its group clears
//              what they have of other sequences
//   state      keeps the state in registers, publishes it as an operand before each chunk, adds the chunk to it
//   rows, two  take chunks in turn: scores, weights, what is read of the state, values, output
//
// Each warpgroup of rows has an operand buffer of its own: the state runs as many chunks ahead of the output. Scans that
// form the state alone have one state warpgroup for every 64 columns, and no rows. The CTAs of a head's dq are a cluster:
// do.o of a row is a sum over all columns.
//
// dk and dv of up to 64 dimensions share a CTA, where the chunks of both come from memory once: their states are each other's
// transpose. One warpgroup of rows has those of dv, one those of dk, and each takes all chunks.
//
// With a window, chunks are taken in pairs: after the sources of both come the tiles of the window, which the second chunk
// sees one later than the first, so that the warpgroups of rows share all but one.
#ifndef HF_LINATTN_SCAN_SM90_CUH_
#define HF_LINATTN_SCAN_SM90_CUH_

#include "engine_wgmma.cuh"
#include "launch.cuh"
#include "scan_warpgroup.cuh"

namespace hf_linattn {

// Warpgroups of a CTA, by role. `tiles`: of 64 columns of z that a CTA covers.
HF_LINATTN_BOTH_SIDES constexpr int row_groups_of(ScanKind kind) { return forms_state_only(kind) ? 0 : 2; }
HF_LINATTN_BOTH_SIDES constexpr int threads_sm90(ScanKind kind, int tiles) {
  return (row_groups_of(kind) + tiles + 1) * kWarpgroupThreads;
}

struct TileMaps {
  CUtensorMap x, y, z, q;
  CUtensorMap window_x, window_y;
};

#if HF_LINATTN_HAS_SM90

// Shared memory of a CTA: barriers, stages, operands and sums of the state for each warpgroup of rows, token arrays.
template <class Work, int kTiles>
struct Layout90 {
  static constexpr int kXBytes = Work::XTile::kBytes, kZBytes = Work::ZTile::kBytes;
  static constexpr int kY = Work::kHasOutput ? kXBytes : 0;
  static constexpr int kZ = kY + (Work::kHasSources ? kXBytes : 0);
  static constexpr int kQ = kZ + (Work::kHasSources ? kTiles * kZBytes : 0);
  static constexpr bool kHasQ = Work::kProjects || Work::kIsPaired;  // paired: x of dk
  static constexpr int kStageBytes = kQ + (kHasQ ? kZBytes : 0);
  static constexpr int kRowGroups = row_groups_of(Work::kScanKind), kRowWarps = kRowGroups * 4;
  static constexpr int kTurns = Work::kIsPaired ? 1 : kRowGroups;  // warpgroups of rows that share the chunks of an output
  static constexpr bool kIsCleared = Work::kHasSources;  // otherwise no warp clears
  static constexpr int kStateWarps = kTiles * 4;
  static constexpr int kConsumerWarps = kRowWarps + (Work::kHasSources ? kStateWarps + 1 : 0);
  static constexpr int kRowTokenBytes = Work::kRowArrays * Work::kTokenArrayBytes;
  static constexpr int kStateTokenBytes = (Work::kTokenArrays - Work::kFirstStateArray) * Work::kTokenArrayBytes;
  static constexpr int kBarrierBytes = 1024, kMaxStages = 8, kSmemLimit = 227 * 1024;
  static constexpr int kMaxCluster = 4, kRowBytes = kChunk * 4;  // a float a row, of each CTA of a cluster
  static constexpr int kExchangeBytes = Work::kProjects ? kRowGroups * 2 * kMaxCluster * kRowBytes : 0;
  // With a window both warpgroups of rows work on the same tiles: the output needs a place of its own.
  static constexpr int kOutBytes = Work::kHasWindow ? Work::OutTile::kBytes : 0;
  static constexpr int kFixedBytes = kBarrierBytes + kRowGroups * (Work::kOperandBytes + Work::kSumBytes) +
                                     kRowWarps * (kOutBytes + kRowTokenBytes) + kStateWarps * kStateTokenBytes +
                                     kExchangeBytes;
  static constexpr int kFitting = (kSmemLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kBytes = kFixedBytes + kStages * kStageBytes;
  static_assert(kStages >= 3, "two chunks are worked on while a third arrives");
  // A stage serves the same warpgroup of rows whenever it comes round: the others need not wait for it to know its phase.
  static constexpr bool kStagesHaveRows = kTurns > 1 && kStages % (kTurns > 0 ? kTurns : 1) == 0 && !Work::kHasWindow;
  static __device__ __forceinline__ bool skips(int members) { return kStagesHaveRows && members == 1; }
  static __device__ __forceinline__ int consumer_warps(int members) {
    return skips(members) ? kConsumerWarps - kRowWarps + 4 : kConsumerWarps;
  }

  // Barriers: of stages; of the operand buffer of each warpgroup of rows; of the exchange between CTAs, for every other
  // chunk of such a warpgroup (a CTA that is ahead must not meet what another has yet to read); of stages whose rows of
  // other sequences are cleared.
  static __device__ __forceinline__ uint32_t full(uint32_t base, int stage) { return base + 8 * stage; }
  static __device__ __forceinline__ uint32_t empty(uint32_t base, int stage) { return base + 8 * (kMaxStages + stage); }
  static constexpr int kFirstOfRows = 2 * kMaxStages;
  static __device__ __forceinline__ uint32_t published(uint32_t base, int group) { return base + 8 * (kFirstOfRows + group); }
  static __device__ __forceinline__ uint32_t read(uint32_t base, int group) {
    return base + 8 * (kFirstOfRows + kRowGroups + group);
  }
  static __device__ __forceinline__ uint32_t exchanged(uint32_t base, int group, int turn) {
    return base + 8 * (kFirstOfRows + 2 * kRowGroups + 2 * group + turn);
  }
  static __device__ __forceinline__ uint32_t cleared(uint32_t base, int stage) {
    return base + 8 * (kFirstOfRows + 4 * kRowGroups + stage);
  }
  static __device__ __forceinline__ uint32_t exchange(uint32_t base, int buffer, int turn, int rank) {
    return state_tokens(base, kStateWarps) + Work::kFirstStateArray * Work::kTokenArrayBytes +
           ((2 * buffer + turn) * kMaxCluster + rank) * kRowBytes;
  }
  static __device__ __forceinline__ uint32_t stage(uint32_t base, int stage) {
    return base + kBarrierBytes + stage * kStageBytes;
  }
  static __device__ __forceinline__ uint32_t operand(uint32_t base, int buffer) {
    return stage(base, kStages) + buffer * Work::kOperandBytes;
  }
  static __device__ __forceinline__ uint32_t out(uint32_t base, int warp) {
    return operand(base, kRowGroups) + warp * kOutBytes;
  }
  static __device__ __forceinline__ uint32_t sums(uint32_t base, int buffer) {
    return out(base, kRowWarps) + buffer * Work::kSumBytes;
  }
  static __device__ __forceinline__ uint32_t row_tokens(uint32_t base, int warp) {
    return sums(base, kRowGroups) + warp * kRowTokenBytes;
  }
  static __device__ __forceinline__ uint32_t state_tokens(uint32_t base, int warp) {
    return row_tokens(base, kRowWarps) + warp * kStateTokenBytes - Work::kFirstStateArray * Work::kTokenArrayBytes;
  }
};

// A consumer's end of the ring: every consumer takes and frees every stage, in order, unless Layout::skips.
template <class Layout>
struct RingPipe {
  const uint32_t base;
  const int z_tile;
  int taken = 0, freed = 0;  // stages; more than one may be taken before the first is freed
  uint32_t parity = 0;

  // The tiles of the next stage, cleared of other sequences. The copy is waited for first: a stage is filled again only
  // after the warp that clears has freed it, so that the other barrier is then in the phase of this turn.
  __device__ __forceinline__ StageTiles acquire() {
    const uint32_t bar = Layout::cleared(base, taken), turn = parity;
    const StageTiles tiles = acquire_as_copied();
    if (Layout::kIsCleared) ptx::mbarrier_wait(bar, turn);
    return tiles;
  }
  __device__ __forceinline__ void pass() {
    acquire_as_copied();
    release();
  }
  __device__ __forceinline__ void skip() {
    if (++taken == Layout::kStages) taken = 0, parity ^= 1;
    if (++freed == Layout::kStages) freed = 0;
  }
  __device__ __forceinline__ StageTiles acquire_as_copied() {
    ptx::mbarrier_wait(Layout::full(base, taken), parity);
    const uint32_t tiles = Layout::stage(base, taken);
    if (++taken == Layout::kStages) taken = 0, parity ^= 1;
    return {tiles, tiles + Layout::kY, tiles + Layout::kZ + z_tile * Layout::kZBytes, tiles + Layout::kQ};
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(Layout::empty(base, freed));
    if (++freed == Layout::kStages) freed = 0;
  }
};

// The producer's end: one thread asks for every tile of the segment, in the order in which the consumers take them.
template <class Work, class Layout>
struct Producer {
  static constexpr int kHalves = Work::kRowsPadded / 64, kHalfBytes = kChunk * 128, kTiles = Layout::kStateWarps / 4;
  static constexpr int kKept = 8;  // chunks of a segment that the scan after a state pass finds in the second-level cache
  const Work& work;
  const TileMaps& maps;
  const uint32_t base;
  const int under_way;  // stages that are asked for and not yet there, at most: 1 to all
  int stage = 0, issued = 0;
  uint32_t parity = 1;

  __device__ __forceinline__ void run() {
    const ScanArgs& args = work.args;
    const int chunks = chunk_count(work.segment);
    const int members = work.members();
    // CTAs of a scan after a state pass begin one by one, as multiprocessors have room again, where no others read what they
    // read; elsewhere together.
    if (Work::kStateOnly && kTiles == 1) ptx::launch_dependents();
    for (int step = 0; step < chunks; ++step) {
      const int64_t first = first_token(step, chunks);
      for (int member = 0; member < members; ++member) {
        const bool with_rows = Work::kHasOutput && member == 0;
        const bool with_q = Layout::kHasQ && (Work::kIsPaired ? with_rows : args.normalize != 0);
        begin_item(with_rows, Work::kHasSources, with_q);
        if (with_rows) load_rows(maps.x, first);
        if (with_q) load(Layout::kQ, maps.q, work.column0, work.head, first);
        const bool is_kept = Work::kMeetsScan && step + kKept >= chunks;
        if (Work::kHasSources) load_sources(maps.y, work.source_token(first), member, is_kept);
        end_item();
      }
      if constexpr (Work::kHasWindow) {
        const bool is_last = step + 1 == chunks;
        if (step % 2 == 1 || is_last) produce_window(step - step % 2, chunks);
      }
    }
    if (!(Work::kStateOnly && kTiles == 1)) ptx::launch_dependents();
  }

 private:
  // The window of the chunks of steps step and, if there is one, step + 1.
  __device__ __forceinline__ void produce_window(int step, int chunks) {
    const int count = step + 1 < chunks ? 2 : 1;
    const int64_t first = first_token(step, chunks);
    const typename Work::WindowTiles window = work.window_tiles_of(first, count);
    for (int member = 0; member < work.members(); ++member) {
      for (int tile = window.begin; tile < window.end; ++tile) {
        const int turn = tile - window.begin;
        const bool with_rows = member == 0 && turn < count;
        begin_item(with_rows, true, false);
        if (with_rows) load_rows(maps.window_x, first_token(step + turn, chunks));
        load_sources(maps.window_y, work.source_token(first, tile), member);
        end_item();
      }
    }
  }
  __device__ __forceinline__ int64_t first_token(int step, int chunks) const {
    return work.first_token(work.chunk_at(step, chunks));
  }
  __device__ __forceinline__ void begin_item(bool with_rows, bool with_sources, bool with_q) {
    if (issued == under_way) {
      const int landed = stage - under_way;  // of this turn of the ring, or of the one before
      const uint32_t bar = Layout::full(base, landed < 0 ? landed + Layout::kStages : landed);
      ptx::mbarrier_wait(bar, landed < 0 ? parity : parity ^ 1);
    } else {
      ++issued;
    }
    ptx::mbarrier_wait(Layout::empty(base, stage), parity);
    const int source_bytes = with_sources ? Layout::kXBytes + kTiles * Layout::kZBytes : 0;
    ptx::mbarrier_arrive_expect_tx(Layout::full(base, stage),
                                   (with_rows ? Layout::kXBytes : 0) + source_bytes + (with_q ? Layout::kZBytes : 0));
  }
  __device__ __forceinline__ void end_item() {
    if (++stage == Layout::kStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void load(int place, const CUtensorMap& map, int column, int head, int64_t token,
                                       bool is_kept = false) {
    const uint32_t to = Layout::stage(base, stage) + place, bar = Layout::full(base, stage);
    const int first = static_cast<int>(token);
    if (is_kept) ptx::tma_load_4d_kept(to, &map, bar, column, head, first, work.segment.batch);
    else ptx::tma_load_4d(to, &map, bar, column, head, first, work.segment.batch);
  }
  __device__ __forceinline__ void load_rows(const CUtensorMap& map, int64_t token) {
    for (int half = 0; half < kHalves; ++half) load(half * kHalfBytes, map, 64 * half, work.head, token);
  }
  __device__ __forceinline__ void load_sources(const CUtensorMap& y, int64_t token, int member, bool is_kept = false) {
    const int head = work.source_head(member);
    for (int half = 0; half < kHalves; ++half) load(Layout::kY + half * kHalfBytes, y, 64 * half, head, token, is_kept);
    for (int i = 0; i < kTiles; ++i) {
      load(Layout::kZ + i * Layout::kZBytes, maps.z, work.column0 + 64 * i, head, token, is_kept);
    }
  }
};

// A warp that clears the rows of other sequences, for all who read a tile: zero times NaN must not reach a product.
template <class Work, class Layout>
__device__ __forceinline__ void clear_tiles(const Work& work, uint32_t base) {
  RingPipe<Layout> pipe{base, 0};
  const int chunks = chunk_count(work.segment);
  auto clear = [&](const TileTokens& sources) {
    const int stage_index = pipe.taken;
    const StageTiles stage = pipe.acquire_as_copied();
    if (!sources.is_whole()) {
      work.template clear_rows<typename Work::XTile, Work::kRowsPadded>(stage.y, sources);
      for (int i = 0; i < Layout::kStateWarps / 4; ++i) {
        work.template clear_rows<typename Work::ZTile, Work::kColumns>(stage.z + i * Layout::kZBytes, sources);
      }
      work.publish_to_engine();
    }
    ptx::mbarrier_arrive(Layout::cleared(base, stage_index));
    pipe.release();
  };
  for (int step = 0; step < chunks; ++step) {
    const TileTokens sources = work.far_tokens(work.first_token(work.chunk_at(step, chunks)));
    for (int member = 0; member < work.members(); ++member) clear(sources);
    if constexpr (Work::kHasWindow) {
      if (step % 2 == 0 && step + 1 < chunks) continue;
      const int64_t first = work.first_token(work.chunk_at(step - step % 2, chunks));
      const auto window = work.window_tiles_of(first, 1 + step % 2);
      for (int member = 0; member < work.members(); ++member) {
        for (int i = window.begin; i < window.end; ++i) clear(work.source_tokens(work.source_token(first, i)));
      }
    }
  }
}

// The state warpgroup. `tile`: which of the CTA's, for scans without rows.
template <class Work, class Layout>
__device__ __forceinline__ void run_state(Work& work, uint32_t base, int tile) {
  RingPipe<Layout> pipe{base, tile};
  const int chunks = chunk_count(work.segment), members = work.members();
  float log_decay = 0.f;  // of the whole segment, log2
  typename Work::TokenInputs next;
  work.places.operand = Layout::operand(base, 0), work.places.sums = Layout::sums(base, 0);
  work.load_state();
  auto publish = [&](int step) {
    constexpr int kBuffers = Work::kHasOutput ? Layout::kRowGroups : 1;
    const int buffer = step % kBuffers;
    work.places.operand = Layout::operand(base, buffer);
    work.places.sums = Layout::sums(base, buffer);
    ptx::mbarrier_wait(Layout::read(base, buffer), step / kBuffers % 2 ^ 1);
    work.publish_state();
    ptx::mbarrier_arrive(Layout::published(base, buffer));
  };
  if constexpr (!Work::kHasSources) {  // the same for all chunks
    for (int group = 0; group < Layout::kRowGroups; ++group) publish(group);
    return;
  }
  struct Item {  // a chunk of one head of the group
    int step, member;
    __device__ __forceinline__ Item following(int members) const {
      return member + 1 < members ? Item{step, member + 1} : Item{step + 1, 0};
    }
  };
  auto load_item = [&](const Item& item) {
    if (Work::kTokenInputs && item.step < chunks) work.load_tokens(next, work.chunk_at(item.step, chunks), item.member);
  };
  // Fragments of a chunk do not depend on the state. Without rows there are registers to form them while the products of
  // the chunk before run.
  constexpr bool kAhead = Work::kStateOnly;
  typename Work::UpdateFragments y[Work::kStateTiles], ahead[Work::kStateTiles];
  StageTiles stage = {};
  float chunk_decay = 0.f;
  auto prepare = [&](const Item& item) {
    const TileTokens sources = work.far_tokens(work.first_token(work.chunk_at(item.step, chunks)));
    if (work.with_token_arrays(sources)) chunk_decay = work.template publish_tokens<false, true>(next, sources);
    load_item(item.following(members));
    stage = pipe.acquire();
  };
  auto load_fragments = [&](auto& fragments) {
#pragma unroll
    for (int m = 0; m < Work::kStateTiles; ++m) work.load_update(fragments[m], stage.y, m);
  };
  load_item({0, 0});
  if (kAhead && chunks > 0) prepare({0, 0}), load_fragments(y);
  for (Item item = {0, 0}; item.step < chunks; item = item.following(members)) {
    if (Work::kHasOutput && item.member == 0) publish(item.step);
    if (!kAhead) prepare(item);
    if (Work::kDecays && item.member == 0) {
      work.decay_state(exp2f(chunk_decay));
      log_decay += chunk_decay;
    }
    const uint32_t z_tile = stage.z;
    const typename Work::EngineType::Operand z = Work::EngineType::operand(z_tile);
    constexpr int kStep = Work::kTilesAtOnce;
#pragma unroll
    for (int m = 0; m < Work::kStateTiles; m += kStep) {
#pragma unroll
      for (int i = m; i < m + kStep && !kAhead; ++i) work.load_update(y[i], stage.y, i);
      work.update_tiles(m, y, z, [&] {
        if (m == 0 && work.with_column_sums()) work.sum_columns(z_tile);
        const Item then = item.following(members);
        if (kAhead && m + kStep == Work::kStateTiles && then.step < chunks) prepare(then), load_fragments(ahead);
      });
    }
    pipe.release();
    if (kAhead) memcpy(y, ahead, sizeof y);
    if constexpr (Work::kHasWindow) {
      const int step = item.step;
      if (item.member + 1 == members && (step % 2 == 1 || step + 1 == chunks)) {
        const auto window = work.window_tiles_of(work.first_token(work.chunk_at(step - step % 2, chunks)), 1 + step % 2);
        for (int i = members * (window.end - window.begin); i > 0; --i) pipe.pass();
      }
    }
  }
  work.store_state(log_decay);
}

// sum = the sum of `part` over the CTAs of the cluster, for this thread's two rows; `use` counts the calls.
template <class Work, class Layout>
__device__ __forceinline__ void sum_over_cluster(const Work& work, uint32_t base, int own, int use, int cluster,
                                                 const float (&part)[2], float (&sum)[2]) {
  if (cluster == 1) {
    sum[0] = part[0], sum[1] = part[1];
    return;
  }
  const int turn = use % 2, row = 16 * work.warp + work.g;
  const uint32_t bar = Layout::exchanged(base, own, turn);
  if (work.warp == 0 && work.lane == 0) ptx::mbarrier_arrive_expect_tx(bar, cluster * Layout::kRowBytes);
  if (work.t < cluster) {  // the four lanes of a row have the same number: each sends it to one CTA
    const uint32_t to = Layout::exchange(base, own, turn, ptx::cluster_rank()) + row * 4;
    const uint32_t remote_bar = ptx::map_shared_rank(bar, work.t);
    ptx::st_async(ptx::map_shared_rank(to, work.t), part[0], remote_bar);
    ptx::st_async(ptx::map_shared_rank(to + 8 * 4, work.t), part[1], remote_bar);
  }
  ptx::mbarrier_wait_cluster(bar, use / 2 % 2);
  sum[0] = sum[1] = 0.f;
  for (int rank = 0; rank < cluster; ++rank) {
    const uint32_t from = Layout::exchange(base, own, turn, rank) + row * 4;
    sum[0] += shared_at<float>(from);
    sum[1] += shared_at<float>(from + 8 * 4);
  }
}

// sum += weights z
template <class Work>
__device__ __forceinline__ void multiply_weights(float (&sum)[Work::kColumns / 2],
                                                 typename Work::FragmentA (&weights)[kChunk / 16], uint32_t z_tile) {
  using Engine = typename Work::EngineType;
  const typename Engine::Operand z = Engine::operand(z_tile);
  Engine::fence();
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    Engine::template gemm_kn<Work::kColumns, typename Work::ZTile>(sum, weights[k], z, 16 * k, true);
  }
  Engine::commit();
  Engine::template wait<0>();
  Engine::keep(sum);
  Engine::keep_fragments(weights);
}

// A warpgroup of rows: the chunks of steps own, own + kTurns, ... of Layout.
template <class Work, class Layout>
__device__ __forceinline__ void run_rows(Work& work, uint32_t base, int own, int cluster) {
  using Engine = typename Work::EngineType;
  constexpr int kRowGroups = Layout::kRowGroups, kTurns = Layout::kTurns;
  RingPipe<Layout> pipe{base, 0};
  const int chunks = chunk_count(work.segment), members = work.members(), own_turn = own % kTurns;
  const bool skips = Layout::skips(members);
  typename Work::TokenInputs next;
  typename Work::FragmentA x[Work::kSteps];
  typename Work::RowSums rows;
  work.places.operand = Layout::operand(base, own);
  work.places.sums = Layout::sums(base, own);
  auto multiply_scores = [&](float (&p)[kChunk / 2], uint32_t y_tile) {
    Engine::fence();
    const typename Engine::Operand y = Engine::operand(y_tile);
#pragma unroll
    for (int k = 0; k < Work::kSteps; ++k) {
      Engine::template gemm_nk<kChunk, typename Work::XTile>(p, x[k], y, 16 * k, k != 0);
    }
    Engine::commit();
  };
  // The window of this pair of chunks: both warpgroups of rows share the tiles, the second sees each one later. `has_rows`:
  // there is a chunk from token `first` on.
  auto add_window = [&](const typename Work::WindowTiles& window, int64_t first, bool has_rows) {
    if (has_rows) work.start_window(rows);
#pragma unroll 1
    for (int member = 0; member < members; ++member) {
#pragma unroll 1
      for (int i = window.begin; i < window.end; ++i) {
        const int tile = i - own;
        if (!has_rows || i < window.begin + own || tile >= window_tiles(work.args.window)) {
          pipe.pass();
          continue;
        }
        const TileTokens sources = work.source_tokens(work.source_token(first, tile));
        float p[kChunk / 2], lse[2];
        typename Work::FragmentA weights[kChunk / 16];
        work.load_lse(lse, work.source_token(first, tile), sources, member);
        const StageTiles stage = pipe.acquire();
        work.publish_lse(lse);
        if (member == 0 && i == window.begin + own) work.load_rows(x, stage.x);
        multiply_scores(p, stage.y);
        Engine::template wait<0>();
        Engine::keep(p);
        work.weigh_window(p, rows, weights, 0, tile, first, sources);
        multiply_weights<Work>(rows.o, weights, stage.z);
        Engine::keep_fragments(x);
        pipe.release();
      }
    }
  };
  if (Work::kTokenInputs && own_turn < chunks) work.load_tokens(next, work.chunk_at(own_turn, chunks), 0);
  for (int step = 0; step < chunks; ++step) {
    const int chunk = work.chunk_at(step, chunks);
    const int64_t first = work.first_token(chunk);
    const TileTokens sources = work.far_tokens(first);
    const int valid = work.valid_tokens(first);
    if (step % kTurns != own_turn) {
      if (skips) pipe.skip();
      for (int member = 0; !skips && member < members; ++member) pipe.pass();
    }
    const int buffer = Work::kIsPaired ? step % kRowGroups : own;  // of the state
    if (Work::kIsPaired) work.places.operand = Layout::operand(base, buffer), work.places.sums = Layout::sums(base, buffer);
    for (int member = 0; step % kTurns == own_turn && member < members; ++member) {
      if (work.with_token_arrays(sources)) work.template publish_tokens<true, false>(next, sources);
      if (member == 0) work.start_rows(rows, next);
      if (Work::kTokenInputs && member + 1 < members) work.load_tokens(next, chunk, member + 1);
      else if (Work::kTokenInputs && step + kTurns < chunks) work.load_tokens(next, work.chunk_at(step + kTurns, chunks), 0);
      StageTiles stage = pipe.acquire();
      if (Work::kReadsTransposed) stage = {stage.q, stage.z, stage.y, stage.x};
      if (member == 0) work.load_rows(x, stage.x);
      // Products run beside the ordinary code that follows them: weights are formed under the read of the state.
      float p[kChunk / 2];
      if constexpr (Work::kHasSources) multiply_scores(p, stage.y);
      if (member == 0) {
        if (Work::kHasSources || step == own) ptx::mbarrier_wait(Layout::published(base, buffer), step / kRowGroups % 2);
        work.read_state(rows.o, x, stage.x);
        Engine::commit();
        if (work.reads_extra()) work.read_row_sums(rows.extra, x, stage.x);
      }
      typename Work::FragmentA weights[kChunk / 16];
      if constexpr (Work::kHasSources) {
        if (member == 0) Engine::template wait<1>();
        else Engine::template wait<0>();
        Engine::keep(p);
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) weights[k] = work.weigh(p, k, 16 * k, rows, sources);
      }
      if (member == 0) {
        Engine::template wait<0>();
        Engine::keep_fragments(x);
        Engine::keep(rows.o);
        work.finish_read(rows);
        if constexpr (Work::kProjects) {
          if (work.args.normalize) work.start_keys(rows);
        }
        if (Work::kHasSources) ptx::mbarrier_arrive(Layout::read(base, buffer));
      }
      if constexpr (Work::kHasSources) {
        multiply_weights<Work>(rows.o, weights, stage.z);
      }
      if constexpr (Work::kProjects && Work::kHasSources) {
        if (work.args.normalize) {
#pragma unroll 1
          for (int part = 0; part < Work::kKeyParts; ++part) {
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) weights[k] = work.key_weights(16 * k, part);
            multiply_weights<Work>(rows.keys, weights, stage.z);
          }
        }
      }
      if constexpr (Work::kProjects) {
        if (work.args.normalize) {
          float part[2], along[2];
          work.partial_along(rows, stage.q, part);
          sum_over_cluster<Work, Layout>(work, base, own, step / kRowGroups, cluster, part, along);
          work.project(rows, along, first, valid);
        }
      }
      if (!Work::kHasWindow && member + 1 == members) {
        // A warp's rows of x are in its registers by now: their place takes the output on its way.
        work.places.out = stage.x + work.warp * Work::OutTile::kBytes;
        work.write_output(rows, first, valid);
        work.publish_to_engine();
      }
      pipe.release();
    }
    if constexpr (Work::kHasWindow) {
      if (step % kRowGroups == 0 && step + 1 < chunks) continue;  // the pair's other chunk follows
      const int pair = step - step % kRowGroups;
      const int64_t own_first = work.first_token(work.chunk_at(pair + own, chunks));
      const auto window = work.window_tiles_of(work.first_token(work.chunk_at(pair, chunks)), step - pair + 1);
      add_window(window, own_first, pair + own < chunks);
      if (pair + own >= chunks) continue;
      work.places.out = Layout::out(base, own * 4 + work.warp);
      work.write_output(rows, own_first, work.valid_tokens(own_first));
    }
  }
  if (own < kRowGroups / kTurns) work.clear_tail();
}

// Formed anew for each role: none keeps it for another.
__device__ __forceinline__ uint32_t own_smem_address() {
  return static_cast<uint32_t>(hidden(static_cast<int>(ptx::smem_address(ptx::dynamic_smem()))));
}

// A CTA's whole work: `block` counts tiles, then heads, then slots. SecondWork, with its args, is that of the second
// warpgroup of rows.
template <class Work, class SecondWork, ScanKind kKind, Reach kReach, int kTiles>
__device__ __forceinline__ void scan_sm90(const ScanArgs& args, const ScanArgs& second_args, const TileMaps& maps, int block,
                                          int tiles, int heads, int under_way) {
  using Layout = Layout90<Work, kTiles>;
  constexpr int kRowWarpgroups = Layout::kRowGroups, kConsumers = kRowWarpgroups + kTiles;
  const int tile = block % tiles, head = block / tiles % heads, slot = block / (tiles * heads);
  if (args.cu_seqlens != nullptr) ptx::wait_for_previous();
  Segment segment = find_segment(args, slot);
  if (!is_wanted<kKind, kReach>(args, segment)) return;
  if constexpr (kKind == ScanKind::kOutput && kReach == Reach::kWindow) segment = wanted_rows(args, segment);
  const uint32_t base = ptx::smem_address(ptx::dynamic_smem());
  const int column0 = tile * kTiles * kTileColumns;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::mbarrier_init(Layout::full(base, i), 1);
      ptx::mbarrier_init(Layout::empty(base, i), Layout::consumer_warps(Work::members(args)));
      ptx::mbarrier_init(Layout::cleared(base, i), 32);
    }
    for (int i = 0; i < Layout::kRowGroups; ++i) {
      ptx::mbarrier_init(Layout::published(base, i), kWarpgroupThreads);
      ptx::mbarrier_init(Layout::read(base, i), kRowWarpgroups / Layout::kTurns * kWarpgroupThreads);
      ptx::mbarrier_init(Layout::exchanged(base, i, 0), 1);
      ptx::mbarrier_init(Layout::exchanged(base, i, 1), 1);
    }
    ptx::mbarrier_init_fence();
  }
  const bool is_clustered = Work::kProjects && tiles > 1;
  if (is_clustered) ptx::cluster_arrive(), ptx::cluster_wait();
  else __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads, warp = threadIdx.x / 32 % 4;
  // CTAs that read the same tiles begin together, so that these come from memory once.
  const bool is_early = warpgroup == kConsumers && args.tiles_are_ready && tiles == 1;
  if (!is_early) ptx::wait_for_previous();
  // Registers are dealt anew by role, from those that a thread has at the start: a sum beyond that waits for ever.
  constexpr int kAtStart = 64 * 1024 / threads_sm90(kKind, kTiles) / 8 * 8, kToDeal = kAtStart * (kConsumers + 1);
  constexpr int kProducerRegisters = Work::kWindowed && !Work::kRowConstant ? 32 : 24;
  constexpr int kRowRegisters = Work::kHasWindow ? 160 : !Work::kProjects ? 144 : Work::kCausal ? 168 : 176;
  constexpr int kLeftRegisters = (kToDeal - kProducerRegisters - kRowWarpgroups * kRowRegisters) / kTiles / 8 * 8;
  constexpr int kStateRegisters = kLeftRegisters < 240 ? kLeftRegisters : 240;
  if (warpgroup == kConsumers) {
    if (kConsumers > 1) ptx::register_dealloc<kProducerRegisters>();
    const Work work(args, segment, head, column0, {});
    if (threadIdx.x % kWarpgroupThreads == 0) Producer<Work, Layout>{work, maps, base, under_way}.run();
    if constexpr (Work::kHasSources) {
      if (warp == 1) clear_tiles<Work, Layout>(work, base);
    }
  } else if (warpgroup < kRowWarpgroups) {
    if constexpr (Work::kHasOutput) {
      ptx::register_alloc<kRowRegisters>();
      const uint32_t base = own_smem_address();
      const uint32_t tokens = Layout::row_tokens(base, warpgroup * 4 + warp);
      if (!Work::kIsPaired || warpgroup == 0) {
        Work work(args, segment, head, column0, {0, 0, tokens, 0});
        run_rows<Work, Layout>(work, base, warpgroup, tiles);
      } else {
        SecondWork work(second_args, segment, head, column0, {0, 0, tokens, 0});
        run_rows<SecondWork, Layout>(work, base, warpgroup, tiles);
      }
    }
  } else {
    if (kConsumers > 1) ptx::register_alloc<kStateRegisters>();  // two warpgroups have enough from the start
    const uint32_t base = own_smem_address();
    const int state_tile = warpgroup - kRowWarpgroups;
    Work work(args, segment, head, column0 + state_tile * kTileColumns,
              {0, 0, Layout::state_tokens(base, state_tile * 4 + warp), 0});
    run_state<Work, Layout>(work, base, state_tile);
  }
  if (is_clustered) ptx::cluster_arrive(), ptx::cluster_wait();  // others may still send to this CTA
}

template <ScanKind kKind, Reach kReach, bool kDecay, int kRows, bool kPaired = false>
using Work90 = ScanWarpgroup<Bf16Wgmma, kKind, kReach, kDecay, kRows, kTileColumns, 1, kPaired>;

#endif  // HF_LINATTN_HAS_SM90

template <ScanKind kKind, Reach kReach, bool kDecay, int kRows, int kTiles>
__global__ void __launch_bounds__(threads_sm90(kKind, kTiles), 1)
    scan_sm90_kernel(const __grid_constant__ ScanArgs args, const __grid_constant__ TileMaps maps, int tiles, int heads,
                     int under_way) {
#if HF_LINATTN_HAS_SM90
  using Work = Work90<kKind, kReach, kDecay, kRows>;
  scan_sm90<Work, Work, kKind, kReach, kTiles>(args, args, maps, blockIdx.x, tiles, heads, under_way);
#endif
}

template <bool kDecay>
__global__ void __launch_bounds__(threads_sm90(ScanKind::kValueGrad, 1), 1)
    key_value_gradient_kernel(const __grid_constant__ ScanArgs value, const __grid_constant__ ScanArgs key,
                              const __grid_constant__ TileMaps maps, int heads, int under_way) {
#if HF_LINATTN_HAS_SM90
  using Value = Work90<ScanKind::kValueGrad, Reach::kCausal, kDecay, kTileColumns, true>;
  using Key = Work90<ScanKind::kKeyGrad, Reach::kCausal, kDecay, kTileColumns, true>;
  scan_sm90<Value, Key, ScanKind::kValueGrad, Reach::kCausal, 1>(value, key, maps, blockIdx.x, 1, heads, under_way);
#endif
}

// Whether the copy engine takes this tensor: 16-byte steps, and a base on one.
inline bool is_tileable(const Rows& rows) {
  const bool base = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  return base && rows.token_stride % 8 == 0 && rows.head_stride % 8 == 0 && rows.batch_stride % 8 == 0;
}

// `q`: of kQueryGrad, or the other x of a pair.
inline int make_tile_maps(ScanKind kind, Reach reach, const ScanArgs& args, const Rows& q, TileMaps& maps) {
  const bool by_kv_head = is_reverse(kind) || forms_state_only(kind);
  const int64_t batch = args.cu_seqlens == nullptr ? args.num_sequences : 1;
  auto map = [&](CUtensorMap* to, const Rows& rows, int num_heads) {
    return make_tensor_map(to, HF_LINATTN_BF16, rows.data, rows.dim, num_heads, args.tokens, batch, rows.head_stride,
                           rows.token_stride, rows.batch_stride, 64, kChunk);
  };
  if (!forms_state_only(kind)) {
    const int heads = by_kv_head ? args.num_kv_heads : args.num_heads;
    if (int error = map(&maps.x, args.x, heads)) return error;
    if (q.data != nullptr) {
      if (int error = map(&maps.q, q, heads)) return error;
    }
  }
  const int source_heads = is_reverse(kind) ? args.num_heads : args.num_kv_heads;
  if (reach != Reach::kAll || forms_state_only(kind)) {
    if (int error = map(&maps.y, args.y, source_heads)) return error;
    if (int error = map(&maps.z, args.z, source_heads)) return error;
  }
  if (reach == Reach::kWindow && args.window_x.data != nullptr) {
    if (int error = map(&maps.window_x, args.window_x, by_kv_head ? args.num_kv_heads : args.num_heads)) return error;
    if (int error = map(&maps.window_y, args.window_y, source_heads)) return error;
  }
  return 0;
}

// How many stages of a ring the copy engine may have under way. Memory has enough to do with kBytesUnderWay of all CTAs; with
// more it is no faster, but serves some multiprocessors long before others.
template <class Layout>
int stages_under_way(int64_t blocks) {
  constexpr int64_t kBytesUnderWay = 6 << 20;
  const int64_t at_once = blocks < multiprocessor_count() ? blocks : multiprocessor_count();
  const int64_t stages = kBytesUnderWay / (at_once > 0 ? at_once * Layout::kStageBytes : 1);
  return stages < 2 ? 2 : stages < Layout::kStages ? static_cast<int>(stages) : Layout::kStages;
}

template <ScanKind kKind, Reach kReach, bool kDecay, int kRows, int kTiles>
int launch_scan_sm90(const ScanArgs& args, cudaStream_t stream) {
  using Work = Work90<kKind, kReach, kDecay, kRows>;
  using Layout = Layout90<Work, kTiles>;
  const int columns = kTiles * kTileColumns, tiles = (args.z.dim + columns - 1) / columns;
  const int heads = is_reverse(kKind) || forms_state_only(kKind) ? args.num_kv_heads : args.num_heads;
  const int64_t blocks = static_cast<int64_t>(tiles) * heads * args.num_slots;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  TileMaps maps = {};
  const Rows q = Work::kProjects && args.normalize ? args.q : Rows{};
  if (int error = make_tile_maps(kKind, kReach, args, q, maps)) return error;
  return launch_early(scan_sm90_kernel<kKind, kReach, kDecay, kRows, kTiles>, dim3(static_cast<unsigned>(blocks)),
                      Work::kProjects ? tiles : 1, threads_sm90(kKind, kTiles), Layout::kBytes, stream, args, maps, tiles,
                      heads, stages_under_way<Layout>(blocks));
}

template <bool kDecay>
int launch_key_value_gradient(const ScanArgs& key, const ScanArgs& value, cudaStream_t stream) {
  using Layout = Layout90<Work90<ScanKind::kValueGrad, Reach::kCausal, kDecay, kTileColumns, true>, 1>;
  const int heads = value.num_kv_heads;
  const int64_t blocks = static_cast<int64_t>(heads) * value.num_slots;
  if (blocks > 0x7fffffff) return set_error("%lld blocks are more than a grid holds", static_cast<long long>(blocks));
  TileMaps maps = {};
  if (int error = make_tile_maps(ScanKind::kValueGrad, Reach::kCausal, value, key.x, maps)) return error;
  return launch_early(key_value_gradient_kernel<kDecay>, dim3(static_cast<unsigned>(blocks)), 1,
                      threads_sm90(ScanKind::kValueGrad, 1), Layout::kBytes, stream, value, key, maps, heads,
                      stages_under_way<Layout>(blocks));
}

}  // namespace hf_linattn

#endif  // HF_LINATTN_SCAN_SM90_CUH_
