// Block quantisation: 32 neighbours share a scale, each becomes the nearest code, ties to even.
//
// values f32 [rows, K], codes u32 and scales f16 as in lib/blocks.wgsl. q8: scale = max |v| / 127, codes in
// -127 .. 127. q4: scale = m / -8 where m is the first value of the largest magnitude, codes in -8 .. 7; the
// scale may be negative.
//
// The result is exact, whatever the adapter's division gives: a quotient is only a first guess, and the guess
// is corrected by comparing numbers that f32 holds without rounding. One invocation makes two blocks, since
// two scales share a word.

import package::lib::index::workgroup_index;
import package::lib::half::f16_bits;

struct Params { count: u32 }                  // blocks

@group(0) @binding(0) var<storage, read> values: array<vec4f>;
@group(0) @binding(1) var<storage, read_write> codes: array<u32>;
@group(0) @binding(2) var<storage, read_write> scales: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;
@if(q4) const LEAST = -8.0;
@else const LEAST = -127.0;
@if(q4) const MOST = 7.0;
@else const MOST = 127.0;

fn f16_value(bits: u32) -> f32 {
  return unpack2x16float(bits).x;
}

// The first value of the largest magnitude.
fn largest(first: u32) -> f32 {
  var found = 0.0;
  for (var i = 0u; i < 8u; i++) {
    let v = values[first + i];
    for (var j = 0u; j < 4u; j++) {
      if (abs(v[j]) > abs(found)) { found = v[j]; }
    }
  }
  return found;
}

// The scale's bits; past the largest finite half, that one.
fn scale_bits(found: f32) -> u32 {
  @if(q4) {
    let bits = f16_bits(found * -0.125);      // exact but for the one rounding
    return (bits & 0x8000u) | min(bits & 0x7fffu, 0x7bffu);
  }
  @else {
    let size = abs(found);
    var bits = min(f16_bits(size * (1.0 / 127.0)), 0x7bffu);
    // Half way to a neighbour, times 127, has fewer than 24 bits.
    if (bits > 0u) {
      let below = 127.0 * (0.5 * (f16_value(bits) + f16_value(bits - 1u)));
      if (size < below || (size == below && (bits & 1u) == 1u)) { bits -= 1u; }
    }
    if (bits < 0x7bffu) {
      let above = 127.0 * (0.5 * (f16_value(bits) + f16_value(bits + 1u)));
      if (size > above || (size == above && (bits & 1u) == 1u)) { bits += 1u; }
    }
    return bits;
  }
}

fn code_of(value: f32, scale: f32) -> u32 {
  if (scale == 0.0) { return 0u; }
  var code = clamp(round(value / scale), LEAST, MOST);
  // value - code * scale is exact: the product has few bits, and the two are close.
  let rest = 2.0 * (value - code * scale) * sign(scale);
  let even = code == 2.0 * floor(0.5 * code);
  if (rest > abs(scale) || (rest == abs(scale) && !even)) { code += 1.0; }
  else if (rest < -abs(scale) || (rest == -abs(scale) && !even)) { code -= 1.0; }
  return u32(i32(clamp(code, LEAST, MOST)));
}

fn encode(number: u32) -> u32 {
  let first = number * 8u;
  let bits = scale_bits(largest(first));
  let scale = f16_value(bits);
  for (var i = 0u; i < 8u; i++) {
    let v = values[first + i];
    var word = 0u;
    for (var j = 0u; j < 4u; j++) {
      @if(q4) word |= ((code_of(v[j], scale) + 8u) & 0xfu) << (8u * j);
      @else word |= (code_of(v[j], scale) & 0xffu) << (8u * j);
    }
    @if(q4) {
      if (i % 2u == 1u) { word = codes[number * 4u + i / 2u] | (word << 4u); }
      codes[number * 4u + i / 2u] = word;
    }
    @else codes[number * 8u + i] = word;
  }
  return bits;
}

@compute @workgroup_size(WG)
fn quantize(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  if (2u * i >= params.count) { return; }
  var pair = encode(2u * i);
  if (2u * i + 1u < params.count) { pair |= encode(2u * i + 1u) << 16u; }
  scales[i] = pair;
}
