// Router: s = sigmoid(logits); the K largest of s + bias among the experts of the best groups, weighted by s.
//
//   logits [T, E], bias [E] -> topk_weight [T, K], topk_idx [T, K] (ascending experts); keys is scratch
//
// A token is worked on by LANES invocations, each owning BLOCKS / LANES blocks of consecutive experts; one
// workgroup takes WG / LANES tokens. Each round takes the largest of the block maxima and looks through that
// one block again: the cost is K * (BLOCKS + E / BLOCKS) loads, no sort. LANES = 1 needs no barrier (many
// tokens, software adapters).
//
// A group's score is the sum of its two largest s + bias; groups and experts go to the lowest number on ties.
// Everything is f32: with half precision neighbouring scores collide. Weights: s / (sum + 1e-20) * scaling.
// Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; the published Nemotron 3 modelling files.
import package::lib::activations::sigmoid;
import package::lib::index::workgroup_index;
import package::lib::order::order_key;

override WG: u32 = 64;
override LANES: u32 = 1;
override BLOCKS: u32 = 8;
override GROUPS: u32 = 1;
override WORDS: u32 = 1; // of 32 experts each

struct Params {
  tokens: u32,
  experts: u32,
  topk: u32,
  topk_group: u32,
  normalise: u32,
  scaling: f32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> bias: array<f32>;
@group(0) @binding(2) var<storage, read_write> keys: array<u32>;
@group(0) @binding(3) var<storage, read_write> topk_weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> topk_idx: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

// Indexed [what][token of the workgroup], so that neighbouring tokens are neighbours in memory.
var<workgroup> best: array<u32, BLOCKS * WG / LANES>;
var<workgroup> chosen: array<u32, WORDS * WG / LANES>;
var<workgroup> group_score: array<f32, GROUPS * WG / LANES>;

fn biased(row: u32, e: u32) -> f32 {
  return sigmoid(logits[row + e]) + bias[e];
}

fn score_group(row: u32, g: u32) -> f32 {
  let width = params.experts / GROUPS;
  var first = biased(row, g * width);
  if (width == 1u) {
    return first;
  }
  var second = biased(row, g * width + 1u);
  if (second > first) {
    let swapped = first;
    first = second;
    second = swapped;
  }
  for (var e = g * width + 2u; e < (g + 1u) * width; e++) {
    let b = biased(row, e);
    second = max(second, min(first, b));
    first = max(first, b);
  }
  return first + second;
}

// Whether fewer than topk_group groups come before group g.
fn group_stays(g: u32, token: u32) -> bool {
  let mine = group_score[g * (WG / LANES) + token];
  var before = 0u;
  for (var other = 0u; other < GROUPS; other++) {
    let score = group_score[other * (WG / LANES) + token];
    before += u32(score > mine || (score == mine && other < g));
  }
  return before < params.topk_group;
}

@compute @workgroup_size(WG)
fn router(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) invocation: u32,
) {
  let tokens_here = WG / LANES;
  let first_token = workgroup_index(wid, nwg) * tokens_here;
  if (first_token >= params.tokens) {
    return;
  }
  let token = invocation / LANES;
  let lane = invocation % LANES;
  // Invocations beyond the last token repeat it, in scratch of their own, since they must reach the barriers.
  let row = min(first_token + token, params.tokens - 1u) * params.experts;
  let scratch = first_token * params.experts + token;

  if (GROUPS > 1u) {
    for (var g = lane; g < GROUPS; g += LANES) {
      group_score[g * tokens_here + token] = score_group(row, g);
    }
    if (LANES > 1u) {
      workgroupBarrier();
    }
  }

  let size = (params.experts + BLOCKS - 1u) / BLOCKS;
  for (var b = lane; b < BLOCKS; b += LANES) {
    var top = 0u;
    var stays = true;
    var group = GROUPS;
    for (var e = b * size; e < min((b + 1u) * size, params.experts); e++) {
      if (GROUPS > 1u) {
        let its_group = e / (params.experts / GROUPS);
        if (its_group != group) {
          group = its_group;
          stays = group_stays(group, token);
        }
      }
      let key = select(0u, order_key(biased(row, e)), stays);
      keys[scratch + e * tokens_here] = key;
      top = max(top, key);
    }
    best[b * tokens_here + token] = top;
  }

  for (var k = 0u; k < params.topk; k++) {
    if (LANES > 1u) {
      workgroupBarrier();
    }
    var top = 0u;
    var winner = 0u;
    for (var b = 0u; b < BLOCKS; b++) {
      let key = best[b * tokens_here + token];
      if (key > top) {
        top = key;
        winner = b;
      }
    }
    if (LANES > 1u) {
      workgroupBarrier(); // everyone has read before the owner writes
    }
    if (winner % LANES == lane) {
      var rest = 0u;
      var taken = false;
      for (var e = winner * size; e < min((winner + 1u) * size, params.experts); e++) {
        let key = keys[scratch + e * tokens_here];
        if (key == top && !taken) {
          taken = true;
          keys[scratch + e * tokens_here] = 0u;
          chosen[(e / 32u) * tokens_here + token] |= 1u << (e % 32u);
        } else {
          rest = max(rest, key);
        }
      }
      best[winner * tokens_here + token] = rest;
    }
  }
  if (LANES > 1u) {
    workgroupBarrier();
  }
  if (lane != 0u || first_token + token >= params.tokens) {
    return;
  }

  let out = (first_token + token) * params.topk;
  var sum = 0.0;
  var k = 0u;
  for (var word = 0u; word < WORDS; word++) {
    var bits = chosen[word * tokens_here + token];
    while (bits != 0u && k < params.topk) {
      let e = word * 32u + countTrailingZeros(bits);
      bits &= bits - 1u;
      let s = sigmoid(logits[row + e]);
      topk_idx[out + k] = e;
      topk_weight[out + k] = s;
      sum += s;
      k++;
    }
  }
  let factor = select(params.scaling, params.scaling / (sum + 1e-20), params.normalise != 0u);
  for (k = 0u; k < params.topk; k++) {
    topk_weight[out + k] *= factor;
  }
}
