// Attention to KV pages on CPUs: what `policy.native_attention` compiles and XLA calls.
//
// A piece of work is a few queries of one KV head of one row: the pages that they may read are read once, where they
// lie, with an online softmax over steps of some pages. Threads of XLA's own pool take pieces until none is left, so
// rows of any lengths share the cores evenly, and a result depends neither on the number of threads nor on what other
// rows hold.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "native_vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Queries that share what is loaded of a page: as many as leave their sums in registers.
#ifdef __AVX512F__
constexpr int64_t kTile = 8;
#else
constexpr int64_t kTile = 4;
#endif
constexpr int64_t kMostQueries = 64;  // of a piece: they, their results and a step's pages stay in near caches
constexpr int64_t kStepKeys = 64;     // of a step, rounded to whole pages
constexpr int64_t kCacheLine = 64;    // bytes
constexpr float kMasked = -1e30f;
constexpr float kLog2E = 1.44269504088896340736f;

template <typename T>
struct Call {
  int64_t rows, tokens, heads, num_pages, kv_heads, page_size, head_dim, width, window;
  const float* q;             // [rows, tokens, heads, head_dim]
  const T *keys, *values;     // [num_pages, kv_heads, page_size, head_dim]
  const int32_t* page_table;  // [rows, width]
  const int32_t* positions;   // [rows, tokens], rising
  const bool* is_live;        // [rows, tokens]
  float* out;                 // as q
  int64_t group() const { return heads / kv_heads; }
  int64_t piece_tokens() const { return std::max<int64_t>(kMostQueries / group(), 1); }
};

struct Query {
  const float* q;
  float* mixed;
  int64_t first, end;  // keys that it reads
  float highest = kMasked, mass = 0.0f;
};

struct Scratch {
  std::vector<Query> queries;
  std::vector<float> floats;
};

template <typename T, int64_t kHeadDim>
struct Piece {
  const Call<T>& call;
  const int64_t row, head;
  Scratch& scratch;
  const int64_t page_size = call.page_size;
  const int64_t step = std::max<int64_t>(kStepKeys / page_size, 1) * page_size;  // keys
  const int64_t stride = (step + kLanes - 1) / kLanes * kLanes;                  // of a query's scores
  const float scale = kLog2E / std::sqrt(static_cast<float>(call.head_dim));
  int64_t first = call.width * page_size, end = 0, count = 0;  // keys that any query reads; queries
  float *scores = nullptr, *transposed = nullptr;              // [kTile, stride], [step / page_size, size, page_size]

  INLINE int64_t size() const { return kHeadDim > 0 ? kHeadDim : call.head_dim; }

  void Attend(int64_t first_token) {
    Collect(first_token);
    const bool is_tiled = count >= kTile && page_size % kLanes == 0;
    scratch.floats.resize(kTile * stride + (is_tiled ? step * size() : 0) + 2 * size());
    scores = scratch.floats.data(), transposed = scores + kTile * stride;
    float* nobody = &scratch.floats.back() + 1 - 2 * size();  // a query that fills up the last tile
    if (is_tiled) scratch.queries.resize((count + kTile - 1) / kTile * kTile, {nobody, nobody + size(), 0, 0});
    for (int64_t start = first / step * step; start < end; start += step) {
      Prefetch(start + step);
      if (is_tiled) Transpose(start);
      for (int64_t i = 0; i < count; i += is_tiled ? kTile : 1) is_tiled ? Step<kTile>(i, start) : Step<1>(i, start);
    }
    for (int64_t i = 0; i < count; ++i) Scale(scratch.queries[i], 1.0f / scratch.queries[i].mass);
  }

  // Queries that are live, in the order of their positions; results of all others are zeros.
  void Collect(int64_t first_token) {
    scratch.queries.clear();
    for (int64_t t = first_token; t < std::min(first_token + call.piece_tokens(), call.tokens); ++t) {
      const int64_t token = row * call.tokens + t, group = call.group();
      const int64_t reads = std::min<int64_t>(call.positions[token] + 1, call.width * page_size);
      const int64_t oldest = call.window > 0 ? std::max<int64_t>(reads - call.window, 0) : 0;
      const int64_t at = (token * call.heads + head * group) * size();
      std::fill_n(call.out + at, group * size(), 0.0f);
      if (!call.is_live[token]) continue;
      for (int64_t g = at; g < at + group * size(); g += size())
        scratch.queries.push_back({call.q + g, call.out + g, oldest, reads});
      first = std::min(first, oldest), end = std::max(end, reads);
    }
    count = scratch.queries.size();
  }

  int64_t PageOf(int64_t key) const {
    const int32_t page = call.page_table[row * call.width + key / page_size];
    return (std::clamp<int64_t>(page, 0, call.num_pages - 1) * call.kv_heads + head) * page_size * size();
  }

  // Pages lie anywhere: no processor guesses the next one.
  void Prefetch(int64_t start) const {
    for (int64_t key = start; key < std::min(start + step, end); key += page_size) {
      const int64_t page = PageOf(key);
      for (int64_t e = 0; e < page_size * size(); e += kCacheLine / sizeof(T)) {
        __builtin_prefetch(call.keys + page + e);
        __builtin_prefetch(call.values + page + e);
      }
    }
  }

  void Transpose(int64_t start) {
    for (int64_t key = 0; key < std::min(step, end - start); key += page_size) {
      const T* page = call.keys + PageOf(start + key);
      for (int64_t e = 0; e < size(); ++e)
        for (int64_t c = 0; c < page_size; ++c) transposed[key * size() + e * page_size + c] = Widen(page[c * size() + e]);
    }
  }

  // One step of the online softmax for `kCount` queries.
  template <int64_t kCount>
  INLINE void Step(int64_t i, int64_t start) {
    Query* queries = &scratch.queries[i];
    const int64_t from = std::max<int64_t>(queries[0].first - start, 0);
    const int64_t to = std::min(queries[std::min(kCount, count - i) - 1].end - start, step);
    if (from >= to) return;
    for (int64_t key = from / page_size * page_size; key < to; key += page_size) {
      if constexpr (kCount == 1) {
        DirectScores(*queries, call.keys + PageOf(start + key), scores + key);
      } else {
        TiledScores(queries, transposed + key * size(), scores + key);
      }
    }
    for (int64_t k = 0; k < kCount; ++k) Weigh(queries[k], from, to, start, scores + k * stride);
    for (int64_t key = from / page_size * page_size; key < to; key += page_size) {
      const int64_t begin = std::max<int64_t>(from - key, 0), stop = std::min(to - key, page_size);
      Mix<kCount>(queries, call.values + PageOf(start + key), begin, stop, scores + key);
    }
  }

  // Scores of one query with a page, in base 2.
  INLINE void DirectScores(const Query& query, const T* keys, float* scores) const {
    for (int64_t c = 0; c < page_size; ++c) {
      Lanes sums = {};
      for (int64_t e = 0; e < size(); e += kLanes) sums += Load(query.q + e) * Load(keys + c * size() + e);
      scores[c] = Sum(sums) * scale;
    }
  }

  // The same for a tile of queries, from keys [size, page_size]: no sum runs across a vector.
  INLINE void TiledScores(const Query* queries, const float* keys, float* scores) const {
    for (int64_t c = 0; c < page_size; c += kLanes) {
      Lanes sums[kTile] = {};
      for (int64_t e = 0; e < size(); ++e) {
        const Lanes key = Load(keys + e * page_size + c);
        for (int64_t i = 0; i < kTile; ++i) sums[i] += queries[i].q[e] * key;
      }
      for (int64_t i = 0; i < kTile; ++i) Store(sums[i] * scale, scores + i * stride + c);
    }
  }

  // Scores become weights where the query reads, and what it has seen before decays. Vectors around [from, to) are
  // whole.
  INLINE void Weigh(Query& query, int64_t from, int64_t to, int64_t start, float* scores) const {
    const int64_t begin = from / kLanes * kLanes, stop = (to + kLanes - 1) / kLanes * kLanes;
    const int64_t oldest = std::clamp(query.first - start, begin, to);
    std::fill(scores + begin, scores + oldest, kMasked);
    std::fill(scores + std::clamp(query.end - start, oldest, to), scores + stop, kMasked);
    Lanes tops = Lanes{} + query.highest, masses = {};
    for (int64_t c = begin; c < stop; c += kLanes) tops = Max(tops, Load(scores + c));
    const float top = Highest(tops), decay = Exp2(Lanes{} + (query.highest - top))[0];
    for (int64_t c = begin; c < stop; c += kLanes) {
      const Lanes weights = Exp2(Load(scores + c) - top);
      masses += weights;
      Store(weights, scores + c);
    }
    query.highest = top;
    query.mass = query.mass * decay + Sum(masses);
    Scale(query, decay);
  }

  // Adds the weighted values of a page; several vectors of sums, so that no addition waits for the one before.
  template <int64_t kCount>
  INLINE void Mix(const Query* queries, const T* values, int64_t from, int64_t to, const float* weights) const {
    constexpr int64_t kWide = kTile / kCount;
    for (int64_t e = 0; e < size(); e += kLanes * kWide) {
      const int64_t wide = std::min(kWide, (size() - e) / kLanes);
      Lanes mixed[kCount][kWide] = {};
      for (int64_t c = from; c < to; ++c) {
        for (int64_t w = 0; w < wide; ++w) {
          const Lanes value = Load(values + c * size() + e + w * kLanes);
          for (int64_t i = 0; i < kCount; ++i) mixed[i][w] += weights[i * stride + c] * value;
        }
      }
      for (int64_t i = 0; i < kCount; ++i) {
        for (int64_t w = 0; w < wide; ++w) {
          float* sum = queries[i].mixed + e + w * kLanes;
          Store(Load(sum) + mixed[i][w], sum);
        }
      }
    }
  }

  INLINE void Scale(const Query& query, float by) const {
    for (int64_t e = 0; e < size(); e += kLanes) Store(Load(query.mixed + e) * by, query.mixed + e);
  }
};

template <typename T, int64_t kHeadDim>
void AttendPiece(const Call<T>& call, int64_t row, int64_t head, int64_t first_token) {
  thread_local Scratch scratch;
  Piece<T, kHeadDim>{call, row, head, scratch}.Attend(first_token);
}

// Common head sizes are compiled with their loops unrolled.
template <typename T>
auto ChoosePiece(int64_t head_dim) {
  switch (head_dim) {
    case 32: return AttendPiece<T, 32>;
    case 64: return AttendPiece<T, 64>;
    case 128: return AttendPiece<T, 128>;
    default: return AttendPiece<T, 0>;
  }
}

struct Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

// All pieces on the caller's thread and those of the pool. The caller works as well and waits only for pieces that
// somebody has begun, so it does not matter when, or whether, the pool finds time.
void Share(ffi::ThreadPool& pool, int64_t num_pieces, std::function<void(int64_t)> piece) {
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t i; (i = progress->taken.fetch_add(1)) < num_pieces;) {
      piece(i);
      if (progress->done.fetch_add(1) + 1 == num_pieces) progress->done.notify_all();
    }
  };
  const int64_t num_threads = std::min(pool.num_threads(), num_pieces);
  for (int64_t i = 1; i < num_threads; ++i) pool.Schedule(std::function<void()>(work));
  work();
  for (int64_t done; (done = progress->done.load()) < num_pieces;) progress->done.wait(done);
}

template <typename T>
ffi::Error Attend(ffi::ThreadPool& pool, const Call<T>& call) {
  const auto attend_piece = ChoosePiece<T>(call.head_dim);
  const int64_t per_head = (call.tokens + call.piece_tokens() - 1) / call.piece_tokens();
  Share(pool, call.rows * call.kv_heads * per_head, [=](int64_t piece) {
    const int64_t head = piece / per_head;
    attend_piece(call, head / call.kv_heads, head % call.kv_heads, piece % per_head * call.piece_tokens());
  });
  return ffi::Error::Success();
}

ffi::Error Run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
               ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::PRED> is_live,
               int64_t window, ffi::ResultBuffer<ffi::F32> out) {
  const auto queries = q.dimensions(), pages = keys.dimensions();
  const auto attend = [&]<typename T>(const T* key_data) {
    return Attend(pool, Call<T>{queries[0], queries[1], queries[2], pages[0], pages[1], pages[2], pages[3],
                                page_table.dimensions()[1], window, q.typed_data(), key_data,
                                static_cast<const T*>(values.untyped_data()), page_table.typed_data(),
                                positions.typed_data(), is_live.typed_data(), out->typed_data()});
  };
  switch (keys.element_type()) {
    case ffi::F32: return attend(static_cast<const float*>(keys.untyped_data()));
    case ffi::BF16: return attend(static_cast<const uint16_t*>(keys.untyped_data()));
    default: return ffi::Error::InvalidArgument("pages must be float32 or bfloat16");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(magistral_paged_attention, Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>());
