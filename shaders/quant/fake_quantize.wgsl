// The values that a low-precision format keeps of a matrix, in f32: quantised and decoded at once.
//
// x f32 [rows, cols] -> y of the same shape. Conditions choose
//   the element   bf16 | e4m3 | e5m2, or E2M1, rounded to nearest even; `stochastic` (E2M1 in blocks of 16
//                 alone): at random with the 8 bits of `random_words`
//   the scale     tensor_scale (an f32: largest magnitude / max), nvfp4 (E4M3 per block times an f32), e8m0
//                 (a power of two per block: the least that fits, or `floor_scale`), block_scale (the same
//                 with 2^-floor(log2(max / amax)), or `whole_scale`: amax / max); bf16 has none
//   the block     params.block neighbours in a row; `columns`: in a column; `square`: block x block. The last
//                 of a line may be shorter. Without blocks the matrix is one row
//   the rows      `grouped`, `gather`, `jobs` and, for x in bf16, `halves` as in lib/strips
//   `placed`      random bits by where the strip stands in a larger matrix of params.whole blocks of 16 along
//                 a line: jobs has the number there of each of params.placed lines (0: they are the own ones;
//                 of columns: of each block of 16 rows), then of every block of 16 columns
//   `given`       scales[params.first] (of a job: its own) instead of what follows from the largest
//                 magnitudes in amax
//
// Numerics: quotients are rounded once (lib/exact); the product of an element and a block's scale is exact. A
// tensor or block with a value that is not finite becomes NaN as a whole, so that nobody overlooks it.
// Formats: src/tensor/formats.ts.

import package::lib::index::workgroup_index;
import package::lib::strips::{matrix_of, store4, fetch, magnitudes, largest_of, Matrix, V, X};
@if(bf16) import package::lib::half::bf16_bits;
import package::lib::formats::{E4M3, E5M2, E2M1, element_value, element_code, scaled_code};
import package::lib::exact::{exact_quotient, exact_product, quotient_code, random_quotient_code};
@if(stochastic) import package::lib::philox::philox4x32;

override WG: u32 = 16;

struct Params {
  rows: u32, cols: u32, block: u32,
  units: u32, each: u32,   // strips, and how many an invocation takes
  groups: u32,             // workgroups
  first: u32, partials: u32, // entries of amax that belong to x
  stream: u32, per: u32,
  apart: u32,              // tells random bits of different tensors apart
  whole: u32, placed: u32,
}

@group(0) @binding(0) var<storage, read> x: array<X>;
@group(0) @binding(1) var<storage, read_write> y: array<V>;
@group(0) @binding(2) var<storage, read> amax: array<u32>;
@group(0) @binding(3) var<storage, read> jobs: array<u32>;
@group(0) @binding(4) var<storage, read> tiles: array<vec4u>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> random: array<u32>;  // seed low, seed high, step
@group(0) @binding(7) var<storage, read> scales: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@if(e4m3) const FORMAT = E4M3;
@elif(e5m2) const FORMAT = E5M2;
@else const FORMAT = E2M1;
// The largest value, and the exponent of the power of two not above it.
@if(e4m3) const MAX = 448.0;
@elif(e5m2) const MAX = 57344.0;
@else const MAX = 6.0;
@if(e4m3) const EMAX = 8u;
@elif(e5m2) const EMAX = 15u;
@else const EMAX = 2u;

// f32(a / b) of the bits of numbers that are not negative.
fn quotient(a: u32, b: f32) -> f32 {
  return bitcast<f32>(exact_quotient(a, bitcast<u32>(b)));
}

// The value of v / scale, in units of the scale.
fn element(v: f32, scale: f32, bits: u32) -> f32 {
  @if(stochastic) let code = random_quotient_code(bitcast<u32>(v), bitcast<u32>(scale), bits, FORMAT);
  @else let code = quotient_code(bitcast<u32>(v), bitcast<u32>(scale), FORMAT);
  return bitcast<f32>(element_value(code, FORMAT));
}

// The same for a power of two.
fn shifted(v: f32, scale: f32) -> f32 {
  let code = scaled_code(bitcast<u32>(v), 127 - i32(bitcast<u32>(scale) >> 23u), FORMAT);
  return bitcast<f32>(element_value(code, FORMAT));
}

// The scale of a matrix, and the bits of its largest magnitude.
struct Tensor { scale: f32, most: u32 }

fn tensor_of(m: Matrix) -> Tensor {
  var most = 0u;
  @if(given) return Tensor(scales[m.first], 0u);
  @elif(tensor_scale || nvfp4) {
    for (var i = 0u; i < m.partials; i++) { most = max(most, amax[m.first + i]); }
    @if(nvfp4) return Tensor(quotient(most, 2688.0), most);
    @else {
      let scale = quotient(most, MAX);
      return Tensor(select(scale, 1.0, scale == 0.0), most);
    }
  }
  @else return Tensor(1.0, 0u);
}

// The scale of a block by the bits of its largest magnitude, without the tensor's.
fn block_scale_of(most: u32, t: Tensor) -> f32 {
  @if(nvfp4) {
    if (t.scale == 0.0) { return 0.0; }
    let code = quotient_code(bitcast<u32>(quotient(most, 6.0)), bitcast<u32>(t.scale), E4M3);
    return bitcast<f32>(element_value(code, E4M3));
  }
  @elif(e8m0) {
    if (most < 0x800000u) { return 0x1p-126; }
    let power = most >> 23u;
    var e = power - min(EMAX, power - 1u);
    @if(!floor_scale) {
      // The significand of MAX: a larger one needs the next power.
      let significand = bitcast<u32>(MAX) & 0x7fffffu;
      if ((most & 0x7fffffu) > significand) { e += 1u; }
    }
    return bitcast<f32>(max(e, 1u) << 23u);
  }
  @elif(block_scale) {
    if (most == 0u) { return 1.0; }
    @if(whole_scale) return quotient(most, MAX);
    @else {
      let e = min(exact_quotient(bitcast<u32>(MAX), most) >> 23u, 253u);
      return bitcast<f32>((254u - e) << 23u);
    }
  }
  @else return 1.0;
}

fn kept(v: f32, most: u32, t: Tensor, scale: f32, bits: u32) -> f32 {
  let worst = max(most, t.most);
  if (worst >= 0x7f800000u) { return bitcast<f32>(worst | 0x7fc00000u); }
  @if(bf16) return bitcast<f32>(bf16_bits(v) << 16u);
  @elif(nvfp4) {
    let factor = bitcast<f32>(exact_product(bitcast<u32>(scale), bitcast<u32>(t.scale)));
    if (factor == 0.0) { return 0.0; }
    return (element(v, factor, bits) * scale) * t.scale;
  }
  @elif(tensor_scale) return element(v, t.scale, bits) * t.scale;
  @elif(whole_scale) return element(v, scale, bits) * scale;
  @else return shifted(v, scale) * scale;
}

// Random words of elements 16 number .. 16 number + 15: word i holds the bytes of elements 4 i .. 4 i + 3.
@if(stochastic) fn random_words(number: u32) -> vec4u {
  return philox4x32(vec4u(number, params.apart, random[2], params.stream), vec2u(random[0], random[1]));
}

// Line number `line` of the own matrix (of columns: block of 16 rows) in the larger one.
@if(placed) fn line_of(line: u32) -> u32 {
  return select(line, jobs[min(line, arrayLength(&jobs) - 1u)], params.placed > 0u);
}

// Column `col` of the own matrix in the larger one.
@if(placed) fn column_of(col: u32) -> u32 {
  return jobs[min(params.placed + col / 16u, arrayLength(&jobs) - 1u)] * 16u + col % 16u;
}

@if(stochastic) fn pick(v: vec4u, i: u32) -> u32 {
  return select(select(v.x, v.y, i == 1u), select(v.z, v.w, i == 3u), i >= 2u);
}

fn round_strip(m: Matrix, t: Tensor, unit: u32) {
  @if(columns) let size = vec2u(params.block, 4u);
  @elif(square) let size = vec2u(params.block, params.block);
  @else let size = vec2u(1u, params.block);
  let across = (m.cols + size.y - 1u) / size.y;
  let row = unit / across * size.x;
  let col = unit % across * size.y;
  let row_end = min(row + size.x, m.rows);
  let col_end = min(col + size.y, m.cols);
  var most = vec4u();
  @if(nvfp4 || e8m0 || block_scale) {
    for (var r = row; r < row_end; r++) {
      for (var c = col; c < col_end; c += 4u) { most = max(most, magnitudes(fetch(m, r, c))); }
    }
    @if(!columns) most = vec4u(largest_of(most));
  }
  @if(columns) let scale = vec4f(block_scale_of(most.x, t), block_scale_of(most.y, t),
    block_scale_of(most.z, t), block_scale_of(most.w, t));
  @else let scale = vec4f(block_scale_of(most.x, t));
  @if(stochastic && columns && placed) let apart = params.whole;
  @if(stochastic && columns && placed) let number = column_of(col) * apart + line_of(row / 16u);
  @if(stochastic && columns && !placed) let apart = (m.rows + 15u) / 16u;
  @if(stochastic && columns && !placed) let number = col * apart + row / 16u;
  @if(stochastic && columns) let words = array(random_words(number), random_words(number + apart),
    random_words(number + 2u * apart), random_words(number + 3u * apart));
  @if(stochastic && !columns && placed)
    let words = random_words(line_of(row) * params.whole + column_of(col) / 16u);
  @if(stochastic && !columns && !placed)
    let words = random_words(row * ((m.cols + 15u) / 16u) + col / 16u);
  for (var r = row; r < row_end; r++) {
    for (var c = col; c < col_end; c += 4u) {
      let v = fetch(m, r, c);
      var bits = vec4u();
      @if(stochastic && columns) let i = (r - row) / 4u;
      @if(stochastic && columns) bits = vec4u(pick(words[0], i), pick(words[1], i), pick(words[2], i),
        pick(words[3], i)) >> vec4u(8u * (r % 4u));
      @if(stochastic && !columns) bits =
        vec4u(pick(words, (c - col) / 4u)) >> vec4u(0u, 8u, 16u, 24u);
      store4(m, r, c, vec4f(kept(v.x, most.x, t, scale.x, bits.x),
        kept(v.y, most.y, t, scale.y, bits.y), kept(v.z, most.z, t, scale.z, bits.z),
        kept(v.w, most.w, t, scale.w, bits.w)));
    }
  }
}

@compute @workgroup_size(WG)
fn values(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let group = workgroup_index(wid, nwg);
  if (group >= params.groups) { return; }
  let m = matrix_of(group);
  let t = tensor_of(m);
  for (var i = m.unit + lane; i < m.end; i += WG) { round_strip(m, t, i); }
}
