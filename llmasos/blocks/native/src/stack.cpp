#include "stack.h"

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace llmasos {

namespace {

constexpr int OWN_ROWS = 4;  // up to here each thread normalises all rows for itself, which is cheaper than to meet

// A copy with zeros behind it.
Floats padded(const float* from, int64_t count) {
    Floats out(rounded_up(count, GROUP));
    std::memcpy(out.data(), from, size_t(count) * sizeof(float));
    return out;
}

}  // namespace

struct Stack::Layer {
    LayerSpec spec;  // its norms point into what is kept here
    std::vector<Floats> kept;

    Norm keep(Norm norm, int64_t count) {
        if (!norm.weight) return norm;
        kept.push_back(padded(norm.weight, count));
        return {kept.back().data(), norm.eps};
    }
    ~Layer() {
        for (Matrix* matrix : {spec.qkv, spec.out, spec.gate_up, spec.down}) {
            free_matrix(*matrix);
            delete matrix;
        }
    }
};

// What all threads see of the rows in a pass. Strides are multiples of GROUP; what is behind a row's width is zero.
struct Stack::Buffers {
    int64_t rows = 0, hidden, qkv, heads, gates = 0, inner = 0;  // strides
    Floats x, normed, branch;  // (rows, hidden)
    Floats q;                  // (rows, qkv)
    Floats attended;           // (rows, heads)
    Floats gate_up;            // (rows, gates)
    Floats act;                // (rows, inner)
};

struct Stack::Scratch {
    Floats linear, attention, normed, head;
};

struct Stack::Pass {
    const Chunk* chunks;
    int first, last;
    int64_t rows = 0;
    float* outside;  // (rows, hidden), tight
    bool decoding = true;  // every session has one row
    std::vector<Piece> pieces;
    std::vector<int64_t> position;  // of each row
    std::vector<int> owner;         // the chunk of each row
    std::vector<std::atomic<int64_t>> taken;  // per layer: pieces that somebody works on
};

Stack::Stack(Geometry geometry, int threads, const Kernels& kernels)
    : geometry_(geometry), kernels_(kernels), pool_(threads), buffers_(new Buffers) {
    const int64_t d = geometry.head_dim;
    buffers_->hidden = rounded_up(geometry.hidden, GROUP);
    buffers_->heads = rounded_up(geometry.heads * d, GROUP);
    buffers_->qkv = rounded_up((geometry.heads + 2 * geometry.kv_heads) * d, GROUP);
}

Stack::~Stack() = default;

void Stack::add(const LayerSpec& spec) {
    auto layer = std::make_unique<Layer>();
    layer->spec = spec;
    LayerSpec& own = layer->spec;
    own.pre_attention = layer->keep(spec.pre_attention, geometry_.hidden);
    own.post_attention = layer->keep(spec.post_attention, geometry_.hidden);
    own.pre_mlp = layer->keep(spec.pre_mlp, geometry_.hidden);
    own.post_mlp = layer->keep(spec.post_mlp, geometry_.hidden);
    own.query_norm = layer->keep(spec.query_norm, geometry_.head_dim);
    own.key_norm = layer->keep(spec.key_norm, geometry_.head_dim);
    for (const Matrix* matrix : {spec.qkv, spec.out, spec.gate_up, spec.down}) weight_bytes_ += matrix->nbytes;
    buffers_->gates = std::max<int64_t>(buffers_->gates, spec.gate_up->outputs);
    buffers_->inner = std::max<int64_t>(buffers_->inner, spec.down->padded_inputs);
    buffers_->rows = 0;  // they are made anew
    scratch_.clear();
    layers_.push_back(std::move(layer));
}

void Stack::set_rotary(int table, const float* cosines, const float* sines, int64_t positions, int width) {
    if (static_cast<size_t>(table) >= rotary_.size()) rotary_.resize(size_t(table) + 1);
    rotary_[size_t(table)] = {cosines, sines, positions, width};
}

void Stack::forward(int first, int last, const Chunk* chunks, int count, float* rows) {
    Pass pass{};
    pass.chunks = chunks;
    pass.first = first;
    pass.last = last;
    pass.outside = rows;
    plan(chunks, count, pass);
    if (pass.rows == 0 || first == last) return;
    struct Call {
        Stack* stack;
        Pass* pass;
    } call{this, &pass};
    pool_.run([](void* argument, int thread) {
        auto* given = static_cast<Call*>(argument);
        given->stack->work(*given->pass, thread);
    }, &call);
}

// Everything that takes memory.
void Stack::plan(const Chunk* chunks, int count, Pass& pass) {
    const int group = geometry_.heads / geometry_.kv_heads;
    const int64_t tile = std::max(1, TILE_ROWS / group);
    for (int c = 0; c < count; c++) {
        const Chunk& chunk = chunks[c];
        const int64_t end = chunk.position + chunk.rows;
        if (chunk.rows > 0) chunk.cache->reserve(pass.first, pass.last, end);
        if (chunk.rows > 1) pass.decoding = false;
        for (int64_t at = chunk.position; at < end;) {
            const int64_t page_end = (at / PAGE_TOKENS + 1) * PAGE_TOKENS;
            const int64_t some = std::min({tile, end - at, page_end - at});
            for (int head = 0; head < geometry_.kv_heads; head++)
                pass.pieces.push_back({c, pass.rows + at - chunk.position, some, at, head});
            at += some;
        }
        for (int64_t at = chunk.position; at < end; at++) {
            pass.position.push_back(at);
            pass.owner.push_back(c);
        }
        pass.rows += chunk.rows;
    }
    std::vector<std::atomic<int64_t>> taken(size_t(pass.last - pass.first));
    pass.taken.swap(taken);
    Buffers& b = *buffers_;
    if (pass.rows > b.rows) {
        const int64_t room = rounded_up(pass.rows, 16);
        b.rows = 0;  // until all of them are there
        b.x = Floats(room * b.hidden);
        b.normed = Floats(room * b.hidden);
        b.branch = Floats(room * b.hidden);
        b.q = Floats(room * b.qkv);
        b.attended = Floats(room * b.heads);
        b.gate_up = Floats(room * b.gates);
        b.act = Floats(room * b.inner);
        b.rows = room;
    }
    const int64_t widest = std::max({b.hidden, b.heads, b.inner});
    while (static_cast<int>(scratch_.size()) < pool_.threads()) {
        auto own = std::make_unique<Scratch>();
        own->linear = Floats(linear_scratch(int(widest)));
        own->attention = Floats(attention_scratch(geometry_.head_dim));
        own->normed = Floats(OWN_ROWS * b.hidden);
        own->head = Floats(rounded_up(geometry_.head_dim, 16));
        scratch_.push_back(std::move(own));
    }
}

void Stack::work(Pass& pass, int thread) {
    const int64_t threads = pool_.threads(), width = geometry_.hidden;
    Buffers& b = *buffers_;
    const int64_t begin = pass.rows * thread / threads, end = pass.rows * (thread + 1) / threads;
    for (int64_t row = begin; row < end; row++) {
        float* inside = b.x.data() + row * b.hidden;
        std::memcpy(inside, pass.outside + row * width, sizeof(float) * size_t(width));
        // A norm of a row that was not finite may have left NaN behind its width, where everybody's zeros are.
        std::memset(inside + width, 0, sizeof(float) * size_t(b.hidden - width));
    }
    pool_.meet();
    for (int index = pass.first; index < pass.last; index++)
        run_layer(pass, index, thread, *scratch_[size_t(thread)]);
    for (int64_t row = begin; row < end; row++)
        std::memcpy(pass.outside + row * width, b.x.data() + row * b.hidden, sizeof(float) * size_t(width));
}

// Begins and ends with all threads seeing the same x.
void Stack::run_layer(Pass& pass, int index, int thread, Scratch& own) {
    const Layer& layer = *layers_[size_t(index)];
    const LayerSpec& spec = layer.spec;
    Buffers& b = *buffers_;
    // 1. Queries, keys and values of all rows.
    const float* x = normed(pass, spec.pre_attention, thread, own);
    project(pass, *spec.qkv, x, b.hidden, b.q.data(), b.qkv, nullptr, thread, own);
    pool_.meet();
    // 2. Into the caches. A chunk's queries see the keys of its other rows, so those must all be there.
    if (!pass.decoding) {
        const int64_t items = pass.rows * geometry_.kv_heads, threads = pool_.threads();
        for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++)
            write_kv(pass, layer, index, item / geometry_.kv_heads, int(item % geometry_.kv_heads), own);
        pool_.meet();
    }
    // 3. Attention; pieces differ in length, so whoever is free takes the next.
    for (;;) {
        const auto piece = size_t(pass.taken[size_t(index - pass.first)].fetch_add(1, std::memory_order_relaxed));
        if (piece >= pass.pieces.size()) break;
        attend(pass, layer, index, pass.pieces[piece], own);
    }
    pool_.meet();
    add_branch(pass, *spec.out, b.attended.data(), b.heads, spec.post_attention, thread, own);
    // 4. The gated MLP. A thread's panels hold gates with their ups, so it needs nobody to go on.
    x = normed(pass, spec.pre_mlp, thread, own);
    project(pass, *spec.gate_up, x, b.hidden, b.gate_up.data(), b.gates, nullptr, thread, own);
    gate(pass, layer, thread);
    pool_.meet();
    add_branch(pass, *spec.down, b.act.data(), b.inner, spec.post_mlp, thread, own);
}

// The normalised rows, with the stride of x: x itself where there is no norm.
const float* Stack::normed(Pass& pass, const Norm& norm, int thread, Scratch& own) {
    Buffers& b = *buffers_;
    if (!norm.weight) return b.x.data();
    const bool alone = pass.rows <= OWN_ROWS;
    float* out = alone ? own.normed.data() : b.normed.data();
    const int64_t threads = alone ? 1 : pool_.threads(), part = alone ? 0 : thread;
    for (int64_t row = pass.rows * part / threads; row < pass.rows * (part + 1) / threads; row++)
        kernels_.rms_norm(b.x.data() + row * b.hidden, norm.weight, norm.eps, geometry_.hidden, int(b.hidden), nullptr,
                          out + row * b.hidden);
    if (!alone) pool_.meet();
    return out;
}

void Stack::project(Pass& pass, const Matrix& matrix, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                    const float* residual, int thread, Scratch& own) {
    const int64_t threads = pool_.threads(), panels = matrix.panels;
    const LinearJob job{&matrix, x, x_stride, int(pass.rows), y, y_stride, residual};
    kernels_.linear(job, int(panels * thread / threads), int(panels * (thread + 1) / threads), own.linear.data());
}

// x += norm(matrix * rows), and all threads see it.
void Stack::add_branch(Pass& pass, const Matrix& matrix, const float* rows, int64_t stride, const Norm& norm,
                       int thread, Scratch& own) {
    Buffers& b = *buffers_;
    float* x = b.x.data();
    if (!norm.weight) {
        project(pass, matrix, rows, stride, x, b.hidden, x, thread, own);
    } else {
        float* branch = b.branch.data();
        project(pass, matrix, rows, stride, branch, b.hidden, nullptr, thread, own);
        pool_.meet();
        const int64_t threads = pool_.threads();
        for (int64_t row = pass.rows * thread / threads; row < pass.rows * (thread + 1) / threads; row++)
            kernels_.rms_norm(branch + row * b.hidden, norm.weight, norm.eps, geometry_.hidden, int(b.hidden),
                              x + row * b.hidden, x + row * b.hidden);
    }
    pool_.meet();
}

// Norms and rotates the queries and the key of one kv head in one row, and puts key and value into the cache.
void Stack::write_kv(Pass& pass, const Layer& layer, int index, int64_t row, int kv_head, Scratch& own) {
    const LayerSpec& spec = layer.spec;
    const int64_t d = geometry_.head_dim, group = geometry_.heads / geometry_.kv_heads;
    const int64_t position = pass.position[size_t(row)];
    float* q = buffers_->q.data() + row * buffers_->qkv;
    float* key = q + (geometry_.heads + kv_head) * d;
    const float* value = q + (geometry_.heads + geometry_.kv_heads + kv_head) * d;
    for (int64_t i = 0; i <= group; i++) {
        float* head = i < group ? q + (kv_head * group + i) * d : key;
        const Norm& norm = i < group ? spec.query_norm : spec.key_norm;
        if (norm.weight) kernels_.head_norm(head, norm.weight, norm.eps, int(d), own.head.data());
        if (spec.rotary < 0) continue;
        const Rotary& angles = rotary_[size_t(spec.rotary)];
        kernels_.rotate(head, angles.cosines + position * angles.width, angles.sines + position * angles.width,
                        spec.rotary_width);
    }
    pass.chunks[pass.owner[size_t(row)]].cache->write(index, kv_head, position, key, value);
}

void Stack::attend(Pass& pass, const Layer& layer, int index, const Piece& piece, Scratch& own) {
    if (pass.decoding) write_kv(pass, layer, index, piece.row, piece.kv_head, own);
    const int64_t d = geometry_.head_dim;
    const int group = geometry_.heads / geometry_.kv_heads;
    const Cache& cache = *pass.chunks[piece.chunk].cache;
    AttentionJob job{};
    job.pages = cache.pages(index);
    job.keys_at = cache.keys_at(piece.kv_head);
    job.values_at = cache.values_at(piece.kv_head);
    job.head_dim = int(d);
    job.window = layer.spec.window;
    job.scale = layer.spec.scale;
    job.softcap = layer.spec.softcap;
    job.scratch = own.attention.data();
    auto run = [&] {
        if (job.queries) kernels_.attend(job);
        job.queries = 0;
    };
    for (int64_t r = 0; r < piece.rows; r++) {
        for (int i = 0; i < group; i++) {
            const int64_t head = int64_t{piece.kv_head} * group + i;
            job.query[job.queries] = buffers_->q.data() + (piece.row + r) * buffers_->qkv + head * d;
            job.out[job.queries] = buffers_->attended.data() + (piece.row + r) * buffers_->heads + head * d;
            job.position[job.queries] = piece.position + r;
            if (++job.queries == TILE_ROWS) run();
        }
    }
    run();
}

void Stack::gate(Pass& pass, const Layer& layer, int thread) {
    const int64_t threads = pool_.threads(), panels = layer.spec.gate_up->panels;
    const int64_t begin = panels * thread / threads, end = panels * (thread + 1) / threads;
    const auto activation = Activation(layer.spec.activation);
    for (int64_t row = 0; row < pass.rows; row++)
        kernels_.gate(activation, buffers_->gate_up.data() + row * buffers_->gates + begin * PANEL, int(end - begin),
                      buffers_->act.data() + row * buffers_->inner + begin * PANEL / 2);
}

}  // namespace llmasos
