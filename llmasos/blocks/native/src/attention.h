// Attention of a few queries of one session over its pages, in one sweep with a running maximum.
//
// Laws:
// - Pages lie at fixed positions, and a page is always summed in the order of its positions: keys that a query must not
//   see have weight zero, and to add zero changes no sum. So neither the number of queries in the job nor how the prompt
//   came in changes the order of any sum, and what no query of the job sees need not be read.
// - What lies in a page behind the last position is finite (zeros, or what was there before).
// - A page that a query does not see at all leaves its sums as they are, bit for bit.
#pragma once

#include "tile.h"

namespace {

using llmasos::AttentionJob;
using llmasos::PAGE_TOKENS;

constexpr float NOTHING_YET = -1e30f;  // the running maximum before the first key
constexpr float UNSEEN = -3e38f;       // the score of a key that is not seen: e^(UNSEEN - anything) is zero

// Cap and mask the scores of one query, turn them into weights; returns what the sums so far are multiplied by.
float weigh(float* scores, int64_t from, int64_t to, float scale, float softcap, float& maximum, float& total) {
    Vec part[PAGE_TOKENS / LANES];
    for (int v = 0; v < PAGE_TOKENS / LANES; v++) {
        part[v] = mul(load(scores + v * LANES), fill(scale));
        if (softcap > 0) part[v] = mul(tanh(div(part[v], fill(softcap))), fill(softcap));
        store(scores + v * LANES, part[v]);
    }
    for (int64_t j = 0; j < from; j++) scores[j] = UNSEEN;
    for (int64_t j = to; j < PAGE_TOKENS; j++) scores[j] = UNSEEN;
    Vec most = fill(maximum);
    for (int v = 0; v < PAGE_TOKENS / LANES; v++) {
        part[v] = load(scores + v * LANES);
        most = max(most, part[v]);
    }
    const float before = maximum;
    maximum = largest(most);
    Vec sums = fill(0.0f);
    for (int v = 0; v < PAGE_TOKENS / LANES; v++) {
        part[v] = exp(sub(part[v], fill(maximum)));
        store(scores + v * LANES, part[v]);
        sums = add(sums, part[v]);
    }
    float factor[LANES];
    store(factor, exp(fill(before - maximum)));
    total = total * factor[0] + sum(sums);
    return factor[0];
}

void attend(const AttentionJob& job) {
    const int n = job.queries, width = job.head_dim, vecs = (width + LANES - 1) / LANES;
    const int64_t padded = vecs * LANES;
    float* query = job.scratch;                 // (n, padded)
    float* scores = query + TILE_ROWS * padded;  // (n, PAGE_TOKENS)
    float* sums = scores + TILE_ROWS * PAGE_TOKENS;  // (n, padded)
    float maximum[TILE_ROWS], total[TILE_ROWS];
    int64_t first = job.position[0], last = first;
    for (int i = 0; i < n; i++) {
        memcpy(query + i * padded, job.query[i], sizeof(float) * (size_t)width);
        maximum[i] = NOTHING_YET;
        total[i] = 0.0f;
        if (job.position[i] < first) first = job.position[i];
        if (job.position[i] > last) last = job.position[i];
    }
    memset(sums, 0, sizeof(float) * (size_t)(n * padded));
    first = first - job.window + 1 > 0 ? first - job.window + 1 : 0;
    for (int64_t page = first / PAGE_TOKENS; page <= last / PAGE_TOKENS; page++) {
        const int64_t behind = last + 1 - page * PAGE_TOKENS;
        const int seen = behind < PAGE_TOKENS ? (int)behind : PAGE_TOKENS;
        memset(scores, 0, sizeof(float) * (size_t)(n * PAGE_TOKENS));
        product({query, padded, job.pages[page] + job.keys_at, PAGE_TOKENS, PANEL, width, scores, PAGE_TOKENS}, n,
                (seen + LANES - 1) / LANES);
        for (int i = 0; i < n; i++) {
            const int64_t start = page * PAGE_TOKENS, newest = job.position[i], oldest = newest - job.window + 1;
            const int64_t from = oldest > start ? oldest - start : 0, to = newest + 1 - start;
            const float factor = weigh(scores + i * PAGE_TOKENS, from < PAGE_TOKENS ? from : PAGE_TOKENS,
                                       to < PAGE_TOKENS ? to : PAGE_TOKENS, job.scale, job.softcap, maximum[i], total[i]);
            for (int v = 0; v < vecs; v++)
                store(sums + i * padded + v * LANES, mul(load(sums + i * padded + v * LANES), fill(factor)));
        }
        product({scores, PAGE_TOKENS, job.pages[page] + job.values_at, padded, PANEL, seen, sums, padded}, n, vecs);
    }
    for (int i = 0; i < n; i++) {
        const Vec inverse = fill(1.0f / total[i]);
        for (int v = 0; v < vecs; v++)
            store(sums + i * padded + v * LANES, mul(load(sums + i * padded + v * LANES), inverse));
        memcpy(job.out[i], sums + i * padded, sizeof(float) * (size_t)width);
    }
}

}  // namespace
