// Sum over the K rows of each token, in the order of k:
//   out[t] = sum_k topk_weight[t, k] * y[token_slot[t * K + k]]   (condition `weighted`)
//   out[t] = sum_k y[token_slot[t * K + k]]                       (otherwise; the backward pass of permute)
// added to base[t] under the condition `based`. `spare`: choices without a slot below offsets[experts] and
// `slots` do not count.
//
//   y [T * K, D], topk_weight [T, K] -> out [T, D], in elements of V: vec4f where D is a multiple of 4
//
// One invocation takes every `parts`-th element of one row, four f32 sums at a time: slots and weights are
// loaded once for four.
import package::lib::index::workgroup_index;

override WG: u32 = 64;

@if(vec4) alias V = vec4f;
@else alias V = f32;

struct Params {
  tokens: u32,
  cols: u32, // in V
  parts: u32,
  topk: u32,
  slots: u32,
  experts: u32,
}

@group(0) @binding(0) var<storage, read> y: array<V>;
@group(0) @binding(1) var<storage, read> token_slot: array<u32>;
@if(weighted) @group(0) @binding(2) var<storage, read> topk_weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<V>;
@if(based) @group(0) @binding(4) var<storage, read> base: array<V>;
@if(spare) @group(0) @binding(5) var<storage, read> offsets: array<u32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn combine(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let token = i / params.parts;
  if (token >= params.tokens) {
    return;
  }
  let step = params.parts;
  @if(spare) let slots = min(params.slots, offsets[params.experts]);
  for (var c = i % step; c < params.cols; c += 4u * step) {
    // Columns past the end read the last one and are not written.
    let last = params.cols - 1u;
    let c1 = min(c + step, last);
    let c2 = min(c + 2u * step, last);
    let c3 = min(c + 3u * step, last);
    var s0 = V(0.0);
    var s1 = V(0.0);
    var s2 = V(0.0);
    var s3 = V(0.0);
    for (var k = token * params.topk; k < (token + 1u) * params.topk; k++) {
      @if(spare) { if (token_slot[k] >= slots) { continue; } }
      let row = min(token_slot[k], params.slots - 1u) * params.cols;
      @if(weighted) let w = topk_weight[k];
      @else let w = 1.0;
      s0 += w * y[row + c];
      s1 += w * y[row + c1];
      s2 += w * y[row + c2];
      s3 += w * y[row + c3];
    }
    let at = token * params.cols + c;
    @if(based) { s0 += base[at]; }
    @if(based) { s1 += base[token * params.cols + c1]; }
    @if(based) { s2 += base[token * params.cols + c2]; }
    @if(based) { s3 += base[token * params.cols + c3]; }
    out[at] = s0;
    if (c + step < params.cols) { out[at + step] = s1; }
    if (c + 2u * step < params.cols) { out[at + 2u * step] = s2; }
    if (c + 3u * step < params.cols) { out[at + 3u * step] = s3; }
  }
}
