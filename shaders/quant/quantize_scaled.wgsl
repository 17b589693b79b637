// Quantisation to E4M3, E5M2 and E2M1 with scales, bit for bit like src/tensor/formats.ts.
//
// values f32 [rows, K] (as bits); codes u32 [rows, K * bits / 32], the first code of a word in its lowest
// bits; scales as in lib/blocks.wgsl. Where a scale spans more than a block other launches come first:
//
// largest         magnitudes[g] = max |values| of group g of `span` values, as u32: magnitudes are in the
//                 order of their bits, NaN above all. It starts as zeros; the maximum is the same in any
//                 order.
// tensor_scales   outer[g] = largest_bits[g] / (2688 for NVFP4, else the largest element), exactly rounded
// tile_largest    tile_magnitudes[t] = max |values| of tile t of 16 x 16
// quantize_scaled codes and scales. One invocation makes what shares a word of scales: four blocks of 32
//                 (e8m0) or 16 (E2M1), a block of 128, or 16 values that need no scale of their own.
//
// Of NVFP4 alone: `square`: 16 blocks below one another share a scale, which all store. `reciprocals`: the
// order of Transformer Engine, products with reciprocals. `four_over_six`: every block maps its largest value
// to 6 or to 4, whichever leaves the smaller sum of differences (`squared`: of their squares), 6 on a tie.
// These sums are the adapter's own in f32, of at most 16 terms in order.

import package::lib::index::workgroup_index;
import package::lib::formats::{E4M3, E5M2, E2M1, element_value, scaled_code};
import package::lib::exact::{INFINITY, exact_product, exact_quotient, quotient_code};
import package::lib::scaled::{
  SIX, mx_scale, mx_code, nvfp4_global, nvfp4_scale, nvfp4_divisor, tensor_scale, blockwise_power,
  nvfp4_encoding, reciprocal_scale, reciprocal_factor, product_code,
};

// count: blocks, or groups of `largest`. span: values per group. pieces: workgroups per group. up: 1 for the
// rule "ceil". across: blocks of a row.
struct Params { count: u32, span: u32, pieces: u32, up: u32, across: u32 }

@group(0) @binding(0) var<storage, read> values: array<u32>;
@group(0) @binding(1) var<storage, read_write> magnitudes: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read> largest_bits: array<u32>;
@group(0) @binding(3) var<storage, read_write> outer: array<u32>;
@group(0) @binding(4) var<storage, read> outer_bits: array<u32>;
@group(0) @binding(5) var<storage, read_write> codes: array<u32>;
@group(0) @binding(6) var<storage, read_write> scales: array<u32>;
@group(0) @binding(7) var<storage, read_write> tile_magnitudes: array<u32>;
@group(0) @binding(8) var<storage, read> tile_bits: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 32;

@if(e2m1) const ELEMENT = E2M1;
@elif(e5m2) const ELEMENT = E5M2;
@else const ELEMENT = E4M3;
// The largest element in f32, its significand, and the exponent of the power of two in it.
@if(e5m2) const MOST: u32 = 0x47600000u;
@else const MOST: u32 = 0x43e00000u;
@if(e2m1) const LIMIT: u32 = 0xc00000u;
@else const LIMIT: u32 = 0xe00000u;
@if(e2m1) const EMAX: i32 = 2;
@elif(e5m2) const EMAX: i32 = 15;
@else const EMAX: i32 = 8;
@if(e8m0) const BLOCK: u32 = 32;
@elif(e2m1 || outer) const BLOCK: u32 = 16;
@else const BLOCK: u32 = 128;
// Blocks whose scales share a word, and codes that do.
@if(e8m0 || e2m1) const SHARED: u32 = 4;
@else const SHARED: u32 = 1;
@if(e2m1) const CODES: u32 = 8;
@else const CODES: u32 = 4;

@compute @workgroup_size(WG)
fn largest(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let at = workgroup_index(wid, nwg);
  let group = at / params.pieces;
  if (group >= params.count) { return; }
  var most = 0u;
  for (var i = at % params.pieces * WG + lane; i < params.span; i += params.pieces * WG) {
    most = max(most, values[group * params.span + i] & 0x7fffffffu);
  }
  atomicMax(&magnitudes[group], most);
}

@compute @workgroup_size(WG)
fn tensor_scales(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let g = workgroup_index(wid, nwg) * WG + lane;
  if (g >= params.count) { return; }
  @if(reciprocals) outer[g] = exact_quotient(0x3f800000u, nvfp4_encoding(largest_bits[g]));
  @elif(four_over_six) outer[g] = exact_quotient(largest_bits[g], 0x44c00000u); // 256 * 6
  @elif(e2m1) outer[g] = nvfp4_global(largest_bits[g]);
  @else outer[g] = tensor_scale(largest_bits[g], MOST);
}

fn largest_of(first: u32) -> u32 {
  var most = 0u;
  for (var i = 0u; i < BLOCK; i++) { most = max(most, values[first + i] & 0x7fffffffu); }
  return most;
}

@compute @workgroup_size(WG)
fn tile_largest(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let t = workgroup_index(wid, nwg) * WG + lane;
  if (t >= params.count) { return; }
  let first = t / params.across * params.across * BLOCK + t % params.across;
  var most = 0u;
  for (var row = 0u; row < BLOCK; row++) {
    most = max(most, largest_of((first + row * params.across) * BLOCK));
  }
  tile_magnitudes[t] = most;
}

// The largest magnitude of what shares the scale of block b.
fn largest_of_block(b: u32) -> u32 {
  @if(square) return tile_bits[b / params.across / BLOCK * params.across + b % params.across];
  @else return largest_of(b * BLOCK);
}

// What block b loses with this scale.
@if(four_over_six) fn lost(b: u32, scale: u32, global: u32) -> f32 {
  let divisor = nvfp4_divisor(scale, global);
  let block_scale = bitcast<f32>(element_value(scale, E4M3));
  var sum = 0.0;
  for (var i = b * BLOCK; i < (b + 1u) * BLOCK; i++) {
    let code = quotient_code(values[i], divisor, E2M1);
    let whole = bitcast<u32>(abs(bitcast<f32>(element_value(code, E2M1)) * block_scale));
    let kept = exact_product(whole, global);
    let difference = bitcast<u32>(abs(bitcast<f32>(values[i] & 0x7fffffffu) - bitcast<f32>(kept)));
    // Through bits, so that no driver joins a product and a sum.
    @if(squared) sum += bitcast<f32>(exact_product(difference, difference));
    @else sum += bitcast<f32>(difference);
  }
  return sum;
}

// How the values of block number b become codes: an E8M0 code, a divisor, a factor or a power of two.
fn scale_of(b: u32) -> vec2u {                // what the codes need, and what is stored
  @if(e8m0) {
    let scale = mx_scale(largest_of_block(b), EMAX, LIMIT, params.up == 1u);
    return vec2u(scale);
  }
  @elif(reciprocals) {
    let group = b * BLOCK / params.span;
    let scale = reciprocal_scale(largest_of_block(b), nvfp4_encoding(largest_bits[group]));
    return vec2u(reciprocal_factor(scale, outer_bits[group]), scale);
  }
  @elif(four_over_six) {
    let global = outer_bits[b * BLOCK / params.span];
    let most = largest_of_block(b);
    var scale = nvfp4_scale(most, SIX, global);
    let fine = nvfp4_scale(most, 0x40800000u, global);
    if (lost(b, fine, global) < lost(b, scale, global)) { scale = fine; }
    return vec2u(nvfp4_divisor(scale, global), scale);
  }
  @elif(e2m1) {
    let global = outer_bits[b * BLOCK / params.span];
    let scale = nvfp4_scale(largest_of_block(b), SIX, global);
    return vec2u(nvfp4_divisor(scale, global), scale);
  }
  @elif(outer) return vec2u(outer_bits[b * BLOCK / params.span]);
  @else {
    let power = blockwise_power(largest_of_block(b));
    return vec2u(u32(power), u32(127 - power) << 23u);
  }
}

fn code_of(x: u32, scale: u32) -> u32 {
  @if(e8m0) return mx_code(x, scale, ELEMENT);
  @elif(reciprocals) return product_code(x, scale, ELEMENT);
  @elif(e2m1 || outer) return quotient_code(x, scale, ELEMENT);
  @else return scaled_code(x, i32(scale), ELEMENT);
}

@compute @workgroup_size(WG)
fn quantize_scaled(
  @builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) wid: vec3u,
  @builtin(num_workgroups) nwg: vec3u,
) {
  let number = workgroup_index(wid, nwg) * WG + lane;
  var stored = 0u;
  for (var i = 0u; i < SHARED; i++) {
    let b = number * SHARED + i;
    if (b >= params.count) { break; }
    let scale = scale_of(b);
    stored |= scale.y << (i * 8u);
    for (var w = b * BLOCK / CODES; w < (b + 1u) * BLOCK / CODES; w++) {
      var word = 0u;
      for (var j = 0u; j < CODES; j++) {
        word |= code_of(values[w * CODES + j], scale.x) << (j * (32u / CODES));
      }
      codes[w] = word;
    }
  }
  @if(e8m0 || e2m1 || !outer) {
    if (number * SHARED < params.count) { scales[number] = stored; }
  }
}
