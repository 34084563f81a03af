// Runs a cluster of blocks of a CUDA kernel on a CPU: each thread is a fiber, which runs until it must wait for others.
//
// A test puts this file in place of the primitives at the head of hbserve/attention/row_cluster.cu. What a barrier or a
// product of tensor cores does for all threads of a block or warp, all fibers meet for. Shared memory begins with bytes
// that are no numbers.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

using std::max;
using std::min;

typedef unsigned short Bits;
typedef unsigned int Word;
typedef unsigned long long Barrier;

#define DEVICE inline
#define __global__
#define __constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint2 {
    Word x, y;
};
struct uint4 {
    Word x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(Word x, Word y) { return {x, y}; }
inline uint4 make_uint4(Word x, Word y, Word z, Word w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

const int THREADS_OF_BLOCK = 32 * WARPS, THREADS_OF_CLUSTER = CLUSTER * THREADS_OF_BLOCK;

struct Index {
    int x;
};
struct Fiber {
    ucontext_t context;
    int place, head;  // place: thread in the cluster
    bool has_ended;
    std::vector<char> stack;
};
struct Meeting {
    int waiting = 0, number = 0;
};

static Fiber *fiber;
static ucontext_t scheduler;
static Meeting of_blocks[CLUSTER], of_warps[THREADS_OF_CLUSTER / 32], of_cluster;
static int cluster_meeting[THREADS_OF_CLUSTER];
static Word exchanged[THREADS_OF_CLUSTER][6];
static std::vector<unsigned char> memory_of_blocks[CLUSTER];
static long expected_bytes, arrived_bytes;

inline int rank_in_cluster() { return fiber->place / THREADS_OF_BLOCK; }
#define threadIdx (Index{fiber->place % THREADS_OF_BLOCK})
#define blockIdx (Index{fiber->head * CLUSTER + rank_in_cluster()})

inline void let_others_run() { swapcontext(&fiber->context, &scheduler); }

inline void arrive(Meeting &meeting, int num_threads) {
    if (++meeting.waiting == num_threads) meeting.waiting = 0, meeting.number++;
}

inline void meet(Meeting &meeting, int num_threads) {
    const int number = meeting.number;
    arrive(meeting, num_threads);
    while (meeting.number == number) let_others_run();
}

inline void __syncthreads() { meet(of_blocks[rank_in_cluster()], THREADS_OF_BLOCK); }
inline void __syncwarp() { meet(of_warps[fiber->place / 32], 32); }

inline float as_float(Word bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline Word as_bits(float value) {
    Word bits;
    memcpy(&bits, &value, 4);
    return bits;
}

#if IS_BFLOAT16
inline float low_of(Word bits) { return as_float(bits << 16); }
inline Word to_16_bits(float value) {
    const Word bits = as_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
#else
inline float low_of(Word bits) {
    const Bits low = bits;
    _Float16 value;
    memcpy(&value, &low, 2);
    return value;
}
inline Word to_16_bits(float value) {
    const _Float16 rounded = value;
    Bits bits;
    memcpy(&bits, &rounded, 2);
    return bits;
}
#endif

inline Word pack(float low, float high) { return to_16_bits(low) | to_16_bits(high) << 16; }
inline float exp2_of(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline Word __byte_perm(Word first, Word second, Word selector) {
    if (selector == 0x5410) return (first & 0xFFFF) | second << 16;
    if (selector == 0x7632) return first >> 16 | (second & 0xFFFF0000);
    abort();
}

inline float of_lane(float value, int lane) {
    exchanged[fiber->place][0] = as_bits(value);
    __syncwarp();
    const float other = as_float(exchanged[fiber->place / 32 * 32 + lane][0]);
    __syncwarp();
    return other;
}
inline float __shfl_sync(Word, float value, int lane) { return of_lane(value, lane); }
inline float __shfl_xor_sync(Word, float value, int step) { return of_lane(value, fiber->place % 32 ^ step); }

// m16n8k16, with the layout of registers that the PTX manual gives.
inline void multiply(float (&c)[4], Word a0, Word a1, Word a2, Word a3, Word b0, Word b1) {
    const Word own[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(exchanged[fiber->place], own, sizeof own);
    __syncwarp();
    const int first = fiber->place / 32 * 32, lane = fiber->place % 32;
    const auto half = [](Word word, int k) { return low_of(k % 2 ? word >> 16 : word); };
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (int k = 0; k < 16; k++) {
            const Word a = exchanged[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const Word b = exchanged[first + column * 4 + k % 8 / 2][4 + k / 8];
            c[e] += half(a, k) * half(b, k);
        }
    }
    __syncwarp();
}

inline void wait_for_kernels_before() {}
inline void *block_memory() { return memory_of_blocks[rank_in_cluster()].data(); }

inline void begin_cluster(Barrier &, Word num_bytes) {
    if (fiber->place == 0) expected_bytes = num_bytes;
    cluster_meeting[fiber->place] = of_cluster.number;
    arrive(of_cluster, THREADS_OF_CLUSTER);
}

inline void meet_cluster() {
    while (of_cluster.number == cluster_meeting[fiber->place]) let_others_run();
}

inline void wait_for_ranks(Barrier &) {
    while (arrived_bytes != expected_bytes) let_others_run();
}

inline void send_bytes(void *own, const void *values, int num_bytes) {
    const long offset = (unsigned char *)own - memory_of_blocks[rank_in_cluster()].data();
    memcpy(memory_of_blocks[0].data() + offset, values, num_bytes);
    arrived_bytes += num_bytes;
}
inline void send(float *own, float first, float second, Barrier &) {
    const float values[2] = {first, second};
    send_bytes(own, values, sizeof values);
}
inline void send(float *own, float4 values, Barrier &) { send_bytes(own, &values, sizeof values); }

static std::function<void()> kernel;

static void run_fiber() {
    kernel();
    fiber->has_ended = true;
    let_others_run();
}

// Run the cluster of a head; return whether all threads have ended.
static bool run_cluster(int head, int shared_bytes) {
    const int STACK_BYTES = 1 << 16, MAX_TURNS = 1 << 18;
    for (auto &memory : memory_of_blocks) memory.assign(shared_bytes, 0xFF);
    for (auto &meeting : of_blocks) meeting = {};
    for (auto &meeting : of_warps) meeting = {};
    of_cluster = {}, expected_bytes = -1, arrived_bytes = 0;
    std::vector<Fiber> fibers(THREADS_OF_CLUSTER);
    for (int place = 0; place < THREADS_OF_CLUSTER; place++) {
        Fiber &own = fibers[place];
        own.place = place, own.head = head, own.has_ended = false;
        own.stack.resize(STACK_BYTES);
        getcontext(&own.context);
        own.context.uc_stack.ss_sp = own.stack.data(), own.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&own.context, run_fiber, 0);
    }
    int num_running = THREADS_OF_CLUSTER;
    for (int turn = 0; turn < MAX_TURNS && num_running; turn++) {
        for (Fiber &own : fibers) {
            if (own.has_ended) continue;
            fiber = &own;
            swapcontext(&scheduler, &own.context);
            num_running -= own.has_ended;
        }
    }
    return !num_running;
}
