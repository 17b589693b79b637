// Where top-k, top-p and min-p cut the tokens of each row, without sorting them.
//
//   logits [B, V], settings [4] -> cut [B] (see lib/sampling). One workgroup takes one row.
//
// Order of the filters: temperature; the top_k first tokens; the shortest prefix with at least top_p of what
// is left; tokens with at least min_p times the largest probability. Both prefixes end at the token where a
// running mass (1 per token, or its weight) reaches an amount. Its key is found BITS bits at a time: the
// masses, by next digit, of all keys that share the bits found so far go into a histogram, a column per
// invocation, so that sums have a fixed order and need no atomics.
//
// Few invocations with wide digits suit software adapters and long rows, narrow digits short ones.
import package::lib::index::workgroup_index;
import package::lib::order::{order_key, order_value};
import package::lib::sampling::{GREEDY_BELOW, is_kept, token_weight};

override WG: u32 = 64;
override BITS: u32 = 4; // a divisor of 32
override DIGITS: u32 = 16; // 2^BITS

struct Params {
  rows: u32,
  vocab: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> settings: array<f32, 4>;
@group(0) @binding(2) var<storage, read_write> cuts: array<vec4u>;
@group(1) @binding(0) var<uniform> params: Params;

var<workgroup> lane_value: array<u32, WG>;
var<workgroup> lane_index: array<u32, WG>;
var<workgroup> histogram: array<f32, DIGITS * WG>; // [digit][lane]
var<workgroup> digits: array<f32, DIGITS>;
var<workgroup> found: vec4u; // of the first lane, for all
var<workgroup> found_amount: f32;

// Largest key of the row and its lowest index.
fn find_largest(row: u32, lane: u32) -> vec2u {
  var best = 0u;
  var index = params.vocab;
  for (var i = lane; i < params.vocab; i += WG) {
    let key = order_key(logits[row + i]);
    if (key > best) {
      best = key;
      index = i;
    }
  }
  lane_value[lane] = best;
  lane_index[lane] = index;
  workgroupBarrier();
  if (lane == 0u) {
    for (var other = 1u; other < WG; other++) {
      if (lane_value[other] > best || (lane_value[other] == best && lane_index[other] < index)) {
        best = lane_value[other];
        index = lane_index[other];
      }
    }
    found = vec4u(best, index, 0u, 0u);
  }
  return workgroupUniformLoad(&found).xy;
}

fn mass(logit: f32, cut: vec4u, by_weight: bool) -> f32 {
  if (by_weight) {
    return token_weight(logit, cut, settings[0]);
  }
  return 1.0;
}

// Shortens `cut` to a mass of at least `amount`, which is a fraction of the kept mass if by_weight.
fn shorten(row: u32, lane: u32, cut: vec4u, amount: f32, by_weight: bool) -> vec4u {
  var prefix = 0u; // bits of the key found so far
  var needed = amount;
  for (var round = 0u; round < 32u / BITS; round++) {
    let shift = 32u - BITS * (round + 1u);
    for (var d = 0u; d < DIGITS; d++) {
      histogram[d * WG + lane] = 0.0;
    }
    for (var i = lane; i < params.vocab; i += WG) {
      let logit = logits[row + i];
      let key = order_key(logit);
      if (((key ^ prefix) >> shift) < DIGITS && is_kept(key, i, cut)) {
        histogram[((key >> shift) & (DIGITS - 1u)) * WG + lane] += mass(logit, cut, by_weight);
      }
    }
    workgroupBarrier();
    for (var d = lane; d < DIGITS; d += WG) {
      var sum = 0.0;
      for (var other = 0u; other < WG; other++) {
        sum += histogram[d * WG + other];
      }
      digits[d] = sum;
    }
    workgroupBarrier();
    if (lane == 0u) {
      var above = 0.0;
      if (by_weight && round == 0u) {
        for (var d = 0u; d < DIGITS; d++) {
          above += digits[d];
        }
        needed *= above;
        above = 0.0;
      }
      // The highest digit at which the mass is reached, or the lowest in use where rounding leaves it short.
      var digit = 0u;
      var before = 0.0;
      for (var d = DIGITS; d > 0u; d--) {
        if (digits[d - 1u] > 0.0) {
          digit = d - 1u;
          before = above;
          above += digits[digit];
          if (above >= needed) {
            break;
          }
        }
      }
      needed -= before;
      prefix |= digit << shift;
      found = vec4u(prefix, 0u, 0u, 0u);
      found_amount = digits[digit];
    }
    prefix = workgroupUniformLoad(&found).x;
  }

  // Of the tokens with the key found, the first `needed / mass` by index stay: usually the only one.
  if (lane == 0u) {
    let each = mass(order_value(prefix), cut, by_weight);
    let is_split = found_amount > max(needed, each);
    found = vec4u(prefix, select(0u, 1u, is_split), u32(max(1.0, ceil(needed / each))), 0u);
  }
  let last = workgroupUniformLoad(&found);
  if (last.y == 0u) {
    return vec4u(cut.x, prefix, select(params.vocab - 1u, cut.z, prefix == cut.y), 0u);
  }
  return vec4u(cut.x, prefix, nth_equal(row, lane, prefix, last.z), 0u);
}

// Index of the n-th token (from 1) with this key: counts by stretches of the row, then by stretches of the
// one that has it.
fn nth_equal(row: u32, lane: u32, key: u32, n: u32) -> u32 {
  var first = 0u;
  var left = n;
  var length = params.vocab;
  while (length > 1u) {
    let stretch = (length + WG - 1u) / WG;
    var equal = 0u;
    let start = first + lane * stretch;
    for (var i = start; i < min(start + stretch, min(first + length, params.vocab)); i++) {
      equal += u32(order_key(logits[row + i]) == key);
    }
    lane_value[lane] = equal;
    workgroupBarrier();
    if (lane == 0u) {
      var owner = 0u;
      while (owner < WG - 1u && lane_value[owner] < left) {
        left -= lane_value[owner];
        owner++;
      }
      found = vec4u(first + owner * stretch, left, 0u, 0u);
    }
    let next = workgroupUniformLoad(&found);
    first = next.x;
    left = next.y;
    length = stretch;
  }
  return first;
}

@compute @workgroup_size(WG)
fn filter_tokens(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let b = workgroup_index(wid, nwg);
  if (b >= params.rows) {
    return;
  }
  let row = b * params.vocab;
  let largest = find_largest(row, lane);
  let top = bitcast<u32>(order_value(largest.x));
  let temperature = settings[0];
  if (temperature < GREEDY_BELOW) {
    if (lane == 0u) {
      cuts[b] = vec4u(top, largest, 0u);
    }
    return;
  }
  var cut = vec4u(top, 0u, params.vocab - 1u, 0u);
  let top_k = settings[1];
  if (top_k >= 1.0 && top_k < f32(params.vocab)) {
    cut = shorten(row, lane, cut, floor(top_k), false);
  }
  if (settings[2] < 1.0) {
    cut = shorten(row, lane, cut, settings[2], true);
  }
  if (settings[3] > 0.0) {
    // weight >= min_p, as a bound on the logit; equal logits stay or go together.
    let bound = order_key(bitcast<f32>(top) + temperature * log(min(settings[3], 1.0)));
    if (bound > cut.y) {
      cut = vec4u(top, bound, params.vocab - 1u, 0u);
    }
  }
  if (lane == 0u) {
    cuts[b] = cut;
  }
}
