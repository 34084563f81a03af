// Attention of a single row, with all that comes between its projection and its output, in clusters of blocks.
//
// hbserve/attention/row_cluster.py compiles this file, and says what the arguments are. A cluster has one KV head and
// its query heads; its blocks see each other's shared memory, so nothing goes through global memory between them:
//
//     kernel before    ---------------------+ q, k, v of the newest token
//     each warp        load 16 stored keys  | norm, rotate q | 16 keys, values ... | merge warps | send to rank 0 |
//     last rank        and values           | norm, rotate k; store k, v; attend to them         |                |
//     rank 0                                                                                      merge ranks --> out
//
// Tiles of 16 tokens go to the ranks in turn, then to the warps of each. Products are m16n8k16 of tensor cores. Which
// memory a thread has of a product's inner dimension is free, as long as both operands agree, and so are the rows and
// columns of the outcome. So each thread loads 16 bytes at a time straight from the cache into registers:
//
//     lane = 4 g + j    scores [heads, tokens]     heads g; dimensions 32 c + 8 j ... + 7; tokens 8 i + g
//                       output [dimensions, heads] dimensions 64 b + 8 g ... + 7; tokens 2 j, 2 j + 1, 2 j + 8, 2 j + 9
//
// A product has 16 rows of heads or 8 columns of heads; there are at most 8 query heads.

typedef unsigned short Bits;  // of a value of 16 bits
typedef unsigned int Word;
typedef unsigned long long Barrier;  // in shared memory

#define DEVICE __device__ __forceinline__

#if IS_BFLOAT16
#define VALUES "bf16"
#else
#define VALUES "f16"
#endif

DEVICE Word pack(float low, float high) {
    Word bits;
    asm("cvt.rn." VALUES "x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE float low_of(Word bits) {
#if IS_BFLOAT16
    return __uint_as_float(bits << 16);
#else
    float value;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(value) : "r"(bits));
    return value;
#endif
}

DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE void multiply(float (&c)[4], Word a0, Word a1, Word a2, Word a3, Word b0, Word b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." VALUES "." VALUES ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void wait_for_kernels_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

DEVICE void *block_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

DEVICE Word address_of(const void *shared) { return (Word)__cvta_generic_to_shared(shared); }

DEVICE int rank_in_cluster() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Let the first rank wait for bytes that the ranks send. The ranks may send once all have met.
DEVICE void begin_cluster(Barrier &arrival, Word num_bytes) {
    if (rank_in_cluster() == 0 && threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&arrival)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&arrival)),
                     "r"(num_bytes)
                     : "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

DEVICE void meet_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

DEVICE void wait_for_ranks(Barrier &arrival) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0; @!done bra again; }" ::"r"(
            address_of(&arrival))
        : "memory");
}

DEVICE Word at_first_rank(const void *own) {
    Word address;
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(address) : "r"(address_of(own)));
    return address;
}

DEVICE void send(float *own, float first, float second, Barrier &arrival) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                     at_first_rank(own)),
                 "f"(first), "f"(second), "r"(at_first_rank(&arrival))
                 : "memory");
}

DEVICE void send(float *own, float4 values, Barrier &arrival) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(at_first_rank(own)),
                 "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(at_first_rank(&arrival))
                 : "memory");
}

// End of the primitives.

DEVICE float high_of(Word bits) { return low_of(bits >> 16); }

DEVICE float rounded(float value) { return low_of(pack(value, 0.0f)); }

DEVICE float xor_max(float value, int step) { return fmaxf(value, __shfl_xor_sync(~0u, value, step)); }

DEVICE float xor_sum(float value, int step) { return value + __shfl_xor_sync(~0u, value, step); }

DEVICE float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value = xor_sum(value, step);
    return value;
}

constexpr int LANES = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256;  // dimensions of a head, padded
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = LANES / 32, BLOCKS = LANES / 64;
constexpr int TILE = 16;                 // tokens that a warp attends to at a time
constexpr int STRIDE = CLUSTER * WARPS;  // tiles that a cluster attends to at a time
constexpr int QUERY_STRIDE = LANES + 32, SUM_STRIDE = LANES + 8;  // padded for the banks of shared memory
constexpr int UNITS = GROUP * LANES / 4;
constexpr float LOWEST = -1e30f;
static_assert(GROUP <= 8 && THREADS >= LANES / 2, "no thread is left without a part");

// The outcome of some tokens for each query head: the highest score, the sum of weights, weighted values.
struct __align__(16) Part {
    float sums[GROUP][SUM_STRIDE], highest_and_total[GROUP][2];
};

struct Shared {
    Part of_ranks[CLUSTER];  // first rank only; the others write it
    Part of_warps[WARPS + 1];  // the last one is of the newest token
    float cos[LANES / 2], sin[LANES / 2];
    float scratch[WARPS][LANES];
    float newest_value[LANES];
    Bits query[8][QUERY_STRIDE], newest_key[LANES];
    Barrier arrival;  // at the first rank
};

extern "C" __constant__ int shared_bytes = sizeof(Shared);

struct Tokens {  // of a warp's tile
    uint4 keys[2][CHUNKS], values[BLOCKS][4];
};

struct Cache {
    const Bits *begin;  // of the KV head
    const int *pages;
    int num_pages, stored;
    long long stride_block, stride_kv, stride_token;

    DEVICE const Bits *key(int page, int token) const {
        return begin + page * stride_block + (token % PAGE) * stride_token;
    }
};

// The pages of a thread's tokens: of two keys, and of four values.
struct Pages {
    int of_keys[2], of_values[4];

    DEVICE void load(const Cache &cache, int tile, int g, int j) {
        for (int i = 0; i < 2; i++) of_keys[i] = at(cache, tile * TILE + 8 * i + g);
        for (int i = 0; i < 4; i++) of_values[i] = at(cache, tile * TILE + 2 * j + i % 2 + i / 2 * 8);
    }

    DEVICE int at(const Cache &cache, int token) {
        // The pages are there before the sequence's length is known.
        return token / PAGE < cache.num_pages ? cache.pages[token / PAGE] : 0;
    }
};

DEVICE void load_keys(Tokens &tokens, const Cache &cache, const Pages &pages, int tile, int g, int j) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int token = tile * TILE + 8 * i + g;
        const Bits *begin = cache.key(pages.of_keys[i], token) + 8 * j;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const bool is_there = token < cache.stored && 32 * c + 8 * j < HEAD_DIM;
            tokens.keys[i][c] = is_there ? *(const uint4 *)(begin + 32 * c) : make_uint4(0, 0, 0, 0);
        }
    }
}

DEVICE void load_values(Tokens &tokens, const Cache &cache, const Pages &pages, int tile, int g, int j) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = tile * TILE + 2 * j + i % 2 + i / 2 * 8;
        const Bits *begin = cache.key(pages.of_values[i], token) + cache.stride_kv + 8 * g;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const bool is_there = token < cache.stored && 64 * b + 8 * g < HEAD_DIM;
            tokens.values[b][i] = is_there ? *(const uint4 *)(begin + 64 * b) : make_uint4(0, 0, 0, 0);
        }
    }
}

DEVICE Word word_of(const uint4 &words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Norm and rotate a head in one warp; a lane has two neighbouring dimensions of every 64.
DEVICE void turn(Word (&words)[BLOCKS], const Word (&weights)[BLOCKS], float eps, const Shared &shared, float *scratch,
                 int lane) {
    float values[BLOCKS][2];
    float square = 0.0f;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        values[b][0] = low_of(words[b]), values[b][1] = high_of(words[b]);
        square += values[b][0] * values[b][0] + values[b][1] * values[b][1];
    }
#if HAS_NORM
    const float norm = rsqrtf(warp_sum(square) / HEAD_DIM + eps);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        values[b][0] = rounded(rounded(values[b][0] * norm) * low_of(weights[b]));
        values[b][1] = rounded(rounded(values[b][1] * norm) * high_of(weights[b]));
    }
#endif
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) *(float2 *)(scratch + 64 * b + 2 * lane) = make_float2(values[b][0], values[b][1]);
    __syncwarp();
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        float turned[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int dimension = 64 * b + 2 * lane + e;
            const bool is_lower = IS_INTERLEAVED ? e == 0 : dimension < ROTATED_DIM / 2;
            const int step = IS_INTERLEAVED ? 1 : ROTATED_DIM / 2;
            const int partner = is_lower ? dimension + step : dimension - step;
            const int pair = IS_INTERLEAVED ? dimension / 2 : is_lower ? dimension : partner;
            turned[e] = values[b][e];
            if (dimension < ROTATED_DIM) {
                const float other = is_lower ? -scratch[partner] : scratch[partner];
                turned[e] = values[b][e] * shared.cos[pair] + other * shared.sin[pair];
            }
        }
        words[b] = pack(turned[0], turned[1]);
    }
    __syncwarp();
}

// Merge parts for four dimensions of a head.
struct Merge {
    float highest, total;
    float4 sums;

    DEVICE Merge(const Part *parts, int num_parts, int extra, int head, int dimension) {
        highest = LOWEST, total = 0.0f, sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int p = 0; p < num_parts; p++) highest = fmaxf(highest, parts[p].highest_and_total[head][0]);
        if (extra >= 0) highest = fmaxf(highest, parts[extra].highest_and_total[head][0]);
#pragma unroll 4
        for (int p = 0; p < num_parts; p++) add(parts[p], head, dimension);
        if (extra >= 0) add(parts[extra], head, dimension);
    }

    DEVICE void add(const Part &part, int head, int dimension) {
        const float weight = exp2_of(part.highest_and_total[head][0] - highest);
        const float4 other = *(const float4 *)&part.sums[head][dimension];
        total += weight * part.highest_and_total[head][1];
        sums.x += weight * other.x, sums.y += weight * other.y, sums.z += weight * other.z, sums.w += weight * other.w;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    row_cluster(const Bits *qkv, Bits *cache_begin, const Bits *query_norm, const Bits *key_norm,
                const float *inverse_frequencies, const long long *positions, const long long *slots, const int *pages,
                Bits *out, long long stride_block, long long stride_kv, long long stride_token, int num_pages,
                float scale, float magnitude, float eps) {
    Shared &shared = *(Shared *)block_memory();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, j = lane % 4;
    const int rank = rank_in_cluster(), head = blockIdx.x / CLUSTER;
    const bool is_newest = rank == CLUSTER - 1;

    // Before the wait only what the host has copied for this step, weights, and keys and values of earlier steps may
    // be read.
    int tile = rank + CLUSTER * warp;
    Cache cache{cache_begin + head * HEAD_DIM, pages, num_pages, 0, stride_block, stride_kv, stride_token};
    Pages pages_of_tile;
    pages_of_tile.load(cache, tile, g, j);
    const long long position = *positions;
    const long long slot = *slots;
    const int stored = (int)position;  // tokens of earlier steps; the newest one follows them
    cache.stored = stored;
    const int num_tiles = (stored + TILE - 1) / TILE;
    const int num_ranks = min(num_tiles, CLUSTER - 1);  // with tokens, beside the last one
    begin_cluster(shared.arrival, (num_ranks + 1) * GROUP * (LANES + 2) * sizeof(float));
    Tokens tokens;
    load_keys(tokens, cache, pages_of_tile, tile, g, j);
    load_values(tokens, cache, pages_of_tile, tile, g, j);
    Word query_weights[BLOCKS] = {}, key_weights[BLOCKS] = {};
#if HAS_NORM
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        if (64 * b + 2 * lane < HEAD_DIM) {
            query_weights[b] = ((const Word *)query_norm)[32 * b + lane];
            key_weights[b] = ((const Word *)key_norm)[32 * b + lane];
        }
    }
#endif
    for (int pair = thread; pair < ROTATED_DIM / 2; pair += THREADS) {
        const float angle = (float)position * inverse_frequencies[pair];
        shared.cos[pair] = cosf(angle) * magnitude, shared.sin[pair] = sinf(angle) * magnitude;
    }
    for (int i = thread; i < (8 - GROUP) * QUERY_STRIDE; i += THREADS) {
        shared.query[GROUP + i / QUERY_STRIDE][i % QUERY_STRIDE] = 0;
    }
    __syncthreads();
    meet_cluster();
    wait_for_kernels_before();

    Word *newest = (Word *)(cache_begin + head * HEAD_DIM + slot / PAGE * stride_block + slot % PAGE * stride_token);
    const bool has_newest = is_newest && thread < HEAD_DIM / 2;  // two dimensions of the newest token
    const Word *newest_source = (const Word *)(qkv + (KV_HEADS * (GROUP + 1) + head) * HEAD_DIM);
    const Word newest_value = has_newest ? newest_source[thread] : 0;
    for (int h = warp; h < GROUP + is_newest; h += WARPS) {
        const bool is_key = h == GROUP;
        const Word *source = (const Word *)(qkv + (is_key ? KV_HEADS * GROUP + head : head * GROUP + h) * HEAD_DIM);
        Word words[BLOCKS], weights[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            words[b] = 64 * b + 2 * lane < HEAD_DIM ? source[32 * b + lane] : 0;
            weights[b] = is_key ? key_weights[b] : query_weights[b];
        }
        turn(words, weights, eps, shared, shared.scratch[warp], lane);
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            if (is_key) {
                ((Word *)shared.newest_key)[32 * b + lane] = words[b];
            } else {  // softmax in base 2: the scale includes log2(e)
                ((Word *)shared.query[h])[32 * b + lane] = pack(low_of(words[b]) * scale, high_of(words[b]) * scale);
            }
        }
    }
    if (is_newest && thread < LANES / 2) {
        *(float2 *)&shared.newest_value[2 * thread] = make_float2(low_of(newest_value), high_of(newest_value));
    }
    __syncthreads();

    uint4 query[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) query[c] = *(const uint4 *)&shared.query[g][32 * c + 8 * j];
    float sums[BLOCKS][4][4] = {};
    float highest = LOWEST, total = 0.0f;  // of head g; the total of this thread's tokens
    const int num_parts = min(max((num_tiles - rank + CLUSTER - 1) / CLUSTER, 0), WARPS);
    for (; tile < num_tiles; tile += STRIDE) {
        const bool has_next = tile + STRIDE < num_tiles;
        if (has_next) pages_of_tile.load(cache, tile + STRIDE, g, j);
        float scores[2][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 &key = tokens.keys[i][c];
                multiply(scores[i], query[c].x, 0, query[c].y, 0, key.x, key.y);
                multiply(scores[i], query[c].z, 0, query[c].w, 0, key.z, key.w);
            }
        }
        if (has_next) load_keys(tokens, cache, pages_of_tile, tile + STRIDE, g, j);
        float new_highest = highest;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (tile * TILE + 8 * i + 2 * j + e >= stored) scores[i][e] = LOWEST;
                new_highest = fmaxf(new_highest, scores[i][e]);
            }
        }
        new_highest = xor_max(xor_max(new_highest, 1), 2);
        const float shrink = exp2_of(highest - new_highest);
        highest = new_highest;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            scores[i][0] = exp2_of(scores[i][0] - highest), scores[i][1] = exp2_of(scores[i][1] - highest);
        }
        total = total * shrink + (scores[0][0] + scores[0][1]) + (scores[1][0] + scores[1][1]);
        const Word weights[2] = {pack(scores[0][0], scores[0][1]), pack(scores[1][0], scores[1][1])};
        // Of heads 2 j and 2 j + 1:
        const float shrinks[2] = {__shfl_sync(~0u, shrink, 8 * j), __shfl_sync(~0u, shrink, 8 * j + 4)};
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const uint4(&value)[4] = tokens.values[b];
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sums[b][i][e] *= shrinks[e % 2];
                const Word first = word_of(value[0], i), second = word_of(value[1], i);
                const Word third = word_of(value[2], i), fourth = word_of(value[3], i);
                multiply(sums[b][i], __byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632),
                         __byte_perm(third, fourth, 0x5410), __byte_perm(third, fourth, 0x7632), weights[0],
                         weights[1]);
            }
        }
        if (has_next) load_values(tokens, cache, pages_of_tile, tile + STRIDE, g, j);
    }
    if (warp < num_parts) {
        Part &part = shared.of_warps[warp];
        total = xor_sum(xor_sum(total, 1), 2);
        if (j == 0 && g < GROUP) *(float2 *)part.highest_and_total[g] = make_float2(highest, total);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (2 * j + e < GROUP) {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) {
                    float4 *target = (float4 *)&part.sums[2 * j + e][64 * b + 8 * g];
                    target[0] = make_float4(sums[b][0][e], sums[b][0][e + 2], sums[b][1][e], sums[b][1][e + 2]);
                    target[1] = make_float4(sums[b][2][e], sums[b][2][e + 2], sums[b][3][e], sums[b][3][e + 2]);
                }
            }
        }
    }
    if (is_newest) {
        Part &part = shared.of_warps[WARPS];
        for (int h = warp; h < GROUP; h += WARPS) {
            float product = 0.0f;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int i = 32 * b + lane;
                const Word key = ((const Word *)shared.newest_key)[i], own = ((const Word *)shared.query[h])[i];
                product += low_of(key) * low_of(own) + high_of(key) * high_of(own);
                *(float2 *)&part.sums[h][2 * i] = *(const float2 *)&shared.newest_value[2 * i];
            }
            product = warp_sum(product);
            if (lane == 0) *(float2 *)part.highest_and_total[h] = make_float2(product, 1.0f);
        }
        if (has_newest && slot >= 0) {  // a padded row is not stored
            newest[thread] = ((const Word *)shared.newest_key)[thread];
            newest[stride_kv / 2 + thread] = newest_value;
        }
    }
    __syncthreads();

    if (num_parts > 0 || is_newest) {
        Part &part = shared.of_ranks[rank];  // at the first rank
        for (int unit = thread; unit < UNITS; unit += THREADS) {
            const int h = unit / (LANES / 4), dimension = unit % (LANES / 4) * 4;
            const Merge merge(shared.of_warps, num_parts, is_newest ? WARPS : -1, h, dimension);
            send(&part.sums[h][dimension], merge.sums, shared.arrival);
            if (dimension == 0) send(part.highest_and_total[h], merge.highest, merge.total, shared.arrival);
        }
    }
    if (rank != 0) return;
    wait_for_ranks(shared.arrival);
    for (int unit = thread; unit < UNITS; unit += THREADS) {
        const int h = unit / (LANES / 4), dimension = unit % (LANES / 4) * 4;
        const Merge merge(shared.of_ranks, num_ranks, CLUSTER - 1, h, dimension);
        const float share = 1.0f / merge.total;
        if (dimension < HEAD_DIM) {
            uint2 values = make_uint2(pack(merge.sums.x * share, merge.sums.y * share),
                                      pack(merge.sums.z * share, merge.sums.w * share));
            *(uint2 *)(out + (head * GROUP + h) * HEAD_DIM + dimension) = values;
        }
    }
}
