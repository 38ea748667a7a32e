// The part of cuBLASLt that teal uses, on a CPU, with the signatures of cublasLt.h. It proposes as many algorithms as
// `proposed` says; number i takes costs[i] on a clock of its own and is known by its first byte. The second byte is its
// tile, one of 1 to `tiles`; with tile t it takes tile_costs[t] instead and tile_waves[t] waves. 0 is the one proposed.
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};
struct Operation {
    int compute, scale;
};
struct Algorithm {
    unsigned char bytes[64];
};
struct Result {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
struct Preference {
    uint64_t most_workspace;
    uint32_t reductions;
};
enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

EXPORT int proposed = 3;
EXPORT float costs[8] = {5, 3, 4, 5, 5, 5, 5, 5};
EXPORT int tiles = 0;
EXPORT float tile_costs[8] = {0, 5, 5, 5, 5, 5, 5, 5};
EXPORT float tile_waves[8] = {0, 1, 1, 1, 1, 1, 1, 1};
EXPORT int refused = -1;  // the tile that products are not supported with
EXPORT int wrong = -1;    // the tile whose products are wrong
EXPORT int silent = 0;    // whether it does not tell an algorithm's tiles
EXPORT int fewest_rows = 0;  // of products that others than the first are supported for
EXPORT size_t tile_workspace = 0;
EXPORT float now = 0;
EXPORT int products = 0;
EXPORT int failing = -1;   // the algorithm whose products fail
EXPORT int capturing = 0;  // nothing but products may be asked for meanwhile
constexpr uint64_t STREAM = 5;

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT int cublasLtCreate(void** handle) { return *handle = new int(1), SUCCESS; }
EXPORT int cublasLtMatmulDescCreate(Operation** it, int compute, int scale) {
    return *it = new Operation{compute, scale}, compute == 68 && scale == 0 ? SUCCESS : INVALID_VALUE;
}
EXPORT int cublasLtMatrixLayoutCreate(Layout** it, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return *it = new Layout{type, rows, columns, stride}, type == 2 || type == 14 ? SUCCESS : NOT_SUPPORTED;
}
EXPORT int cublasLtMatmulPreferenceCreate(Preference** it) { return *it = new Preference{0, 7}, SUCCESS; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference* it, int attribute, const void* value, size_t size) {
    void* to = attribute == 1 ? (void*)&it->most_workspace : &it->reductions;
    if (attribute != 1 && attribute != 3) return INVALID_VALUE;
    if (size != (attribute == 1 ? 8 : 4)) return INVALID_VALUE;
    return memcpy(to, value, size), SUCCESS;
}

static bool fits(const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    return a->type == b->type && a->type == d->type && a->columns == b->rows && a->rows == d->rows && b->columns == d->columns && c->rows == d->rows &&
           c->columns == d->columns;
}

EXPORT int cublasLtMatmulAlgoCheck(void*, Operation*, Layout* a, Layout* b, Layout* c, Layout* d,
                                   const Algorithm* algorithm, Result* result) {
    int index = algorithm->bytes[0], tile = algorithm->bytes[1];
    if (capturing || index >= proposed || !fits(a, b, c, d)) return NOT_SUPPORTED;
    if (tile > tiles || tile == refused) return NOT_SUPPORTED;
    if (index && d->columns < (uint64_t)fewest_rows) return NOT_SUPPORTED;
    *result = Result{};  // as the library does, which does not give the algorithm back
    result->workspace = tile ? tile_workspace : 16 * index;
    result->waves = tile ? tile_waves[tile] : 0.5;
    return SUCCESS;
}
EXPORT int cublasLtMatmulAlgoCapGetAttribute(const Algorithm*, int attribute, int* values, size_t size,
                                             size_t* written) {
    if (attribute != 6 || silent) return INVALID_VALUE;
    *written = sizeof(int) * tiles;
    if (size == 0) return SUCCESS;
    if (size < *written) return INVALID_VALUE;
    for (int i = 0; i < tiles; i++) values[i] = i + 1;
    return SUCCESS;
}
EXPORT int cublasLtMatmulAlgoConfigSetAttribute(Algorithm* algorithm, int attribute, const uint32_t* value,
                                                size_t size) {
    if (attribute != 1 || size != sizeof *value) return INVALID_VALUE;
    return algorithm->bytes[1] = *value, SUCCESS;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                                          Preference* preference, int most, Result* results, int* count) {
    if (capturing || !fits(a, b, c, d)) return INVALID_VALUE;
    if (preference->most_workspace == 0 || preference->reductions != 2) return INVALID_VALUE;
    *count = proposed < most ? proposed : most;
    for (int i = 0; i < *count; i++) {
        results[i] = Result{};
        results[i].algorithm.bytes[0] = i;
        results[i].workspace = 16 * i;
    }
    return *count ? SUCCESS : NOT_SUPPORTED;
}

static float load(const uint16_t* at, int type) {
    if (type == 2) {
        _Float16 value;
        return memcpy(&value, at, 2), value;
    }
    uint32_t bits = uint32_t(*at) << 16;
    float value;
    return memcpy(&value, &bits, 4), value;
}
static void store(uint16_t* at, float value, int type) {
    if (type == 2) {
        _Float16 half = value;
        memcpy(at, &half, 2);
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    *at = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

EXPORT int cublasLtMatmul(void*, Operation*, const float* alpha, const uint16_t* a, Layout* of_a, const uint16_t* b,
                          Layout* of_b, const float* beta, const uint16_t* c, Layout* of_c, uint16_t* d, Layout* of_d,
                          const Algorithm* algorithm, void* workspace, size_t size, void* stream) {
    int index = algorithm->bytes[0], tile = algorithm->bytes[1], type = of_d->type;
    if (!fits(of_a, of_b, of_c, of_d)) return INVALID_VALUE;
    if (size < (tile ? tile_workspace : 16u * index) || (size && !workspace)) return INVALID_VALUE;
    if ((uint64_t)stream != STREAM || index == failing) return INVALID_VALUE;
    for (uint64_t column = 0; column < of_d->columns; column++)
        for (uint64_t row = 0; row < of_d->rows; row++) {
            float sum = 0;
            for (uint64_t k = 0; k < of_a->columns; k++)
                sum += load(a + row + k * of_a->stride, type) * load(b + k + column * of_b->stride, type);
            float before = *beta ? *beta * load(c + row + column * of_c->stride, type) : 0;
            store(d + row + column * of_d->stride, tile == wrong ? 1e3f : *alpha * sum + before, type);
        }
    now += tile ? tile_costs[tile] : costs[index];
    products++;
    return SUCCESS;
}
