// Router: the K largest of c + bias among the experts of the best groups, weighted by s. Both c and s are a
// score of the logits, such as their sigmoid; as a choice softmax is over all experts.
//
//   logits [T, E], bias [E] -> topk_weight [T, K], topk_idx [T, K] (ascending experts); keys is scratch
//
// A token is worked on by LANES invocations, each owning BLOCKS / LANES blocks of consecutive experts; one
// workgroup takes WG / LANES tokens. Each round takes the largest of the block maxima and looks through that
// one block again: the cost is K * (BLOCKS + E / BLOCKS) loads, no sort. LANES = 1 needs no barrier (many
// tokens, software adapters).
//
// A group's score is the sum of its group_best largest c + bias; groups and experts go to the lowest number
// on ties. Everything is f32: with half precision neighbouring scores collide. Weights: lib/router_weights.
// Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; the published Nemotron 3 modelling files.
import package::lib::index::workgroup_index;
import package::lib::order::order_key;
import package::lib::router_score::router_score;
import package::lib::router_weights::score_divisor;
import package::lib::router_weights::top_logit;

override WG: u32 = 64;
override CHOICE: u32 = 0; // score by which experts are chosen
override SCORE: u32 = 0; // score that weighs them
override LANES: u32 = 1;
override BLOCKS: u32 = 8;
override GROUPS: u32 = 1;
override WORDS: u32 = 1; // of 32 experts each

struct Params {
  tokens: u32,
  experts: u32,
  topk: u32,
  topk_group: u32,
  group_best: u32,
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

// What turns exp(x - top) into softmax: (top, 1 / sum). Other scores do not read it.
fn softmax_of(row: u32) -> vec2f {
  var top = logits[row];
  var sum = 0.0;
  if (CHOICE == 1u) {
    for (var e = 1u; e < params.experts; e++) {
      top = max(top, logits[row + e]);
    }
    for (var e = 0u; e < params.experts; e++) {
      sum += exp(logits[row + e] - top);
    }
  }
  return vec2f(top, 1.0 / max(sum, 1.0));
}

fn biased(row: u32, e: u32, softmax: vec2f) -> f32 {
  let score = router_score(CHOICE, logits[row + e], softmax.x);
  if (CHOICE == 1u) {
    return score * softmax.y + bias[e];
  }
  return score + bias[e];
}

// The sum of the group_best largest of a group, each found behind the one before it.
fn score_group(row: u32, g: u32, softmax: vec2f) -> f32 {
  let width = params.experts / GROUPS;
  var sum = 0.0;
  var last = 0.0;
  var last_e = 0u;
  for (var n = 0u; n < min(params.group_best, width); n++) {
    var next = 0.0;
    var next_e = params.experts;
    for (var e = g * width; e < (g + 1u) * width; e++) {
      let b = biased(row, e, softmax);
      let is_behind = n == 0u || b < last || (b == last && e > last_e);
      if (is_behind && (next_e == params.experts || b > next)) {
        next = b;
        next_e = e;
      }
    }
    sum += next;
    last = next;
    last_e = next_e;
  }
  return sum;
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
  let softmax = softmax_of(row);

  if (GROUPS > 1u) {
    for (var g = lane; g < GROUPS; g += LANES) {
      group_score[g * tokens_here + token] = score_group(row, g, softmax);
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
      let key = select(0u, order_key(biased(row, e, softmax)), stays);
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
  var k = 0u;
  for (var word = 0u; word < WORDS; word++) {
    var bits = chosen[word * tokens_here + token];
    while (bits != 0u && k < params.topk) {
      topk_idx[out + k] = word * 32u + countTrailingZeros(bits);
      bits &= bits - 1u;
      k++;
    }
  }
  let top = top_logit(row, out);
  let factor = params.scaling / score_divisor(row, out, top);
  for (k = 0u; k < params.topk; k++) {
    topk_weight[out + k] = router_score(SCORE, logits[row + topk_idx[out + k]], top) * factor;
  }
}
