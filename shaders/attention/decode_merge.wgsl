// Puts the parts of decode_attention together: with w_p = exp(top_p - top), top the largest of the top_p,
// out = sum_p w_p sum_p / sum_p w_p total_p.
//
//   parts [B, L, Hq, nparts, ceil(Dh / 4) + 1] of vec4f: a part's weighted sum of values, its largest score
//   and the sum of its weights, relative to that score · position u32 [1] · out [B, L, Hq, Dh]
//
// One invocation computes four components of a row, in the order of the parts. Parts that begin beyond the
// row's last key were not written and are not read.
import package::lib::index::workgroup_index;

override WG: u32 = 32;
override HEAD_VEC4: u32 = 8;

struct Params {
  rows: u32,
  seqlen: u32,
  capacity: u32,
  nheads: u32,
  head_dim: u32,
  length: u32,
  nparts: u32,
}

@group(0) @binding(0) var<storage, read> parts: array<vec4f>;
@group(0) @binding(1) var<storage, read> position: array<u32>;
@if(vec4) @group(0) @binding(2) var<storage, read_write> out: array<vec4f>;
@else @group(0) @binding(2) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

@compute @workgroup_size(WG)
fn decode_merge(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let i = workgroup_index(wid, nwg) * WG + lane;
  let row = i / HEAD_VEC4;
  let d = i % HEAD_VEC4;
  if (row >= params.rows) { return; }
  let count = min(position[0] + row / params.nheads % params.seqlen + 1u, params.capacity);
  let end = min((count + params.length - 1u) / params.length, params.nparts);
  let first = row * params.nparts * (HEAD_VEC4 + 1u);
  var top = -1e30;
  var total = 0.0;
  var sum = vec4f();
  for (var p = 0u; p < end; p++) {
    let at = first + p * (HEAD_VEC4 + 1u);
    let stat = parts[at + HEAD_VEC4];
    let higher = max(top, stat.x);
    let keep = exp(top - higher);
    let add = exp(stat.x - higher);
    sum = keep * sum + add * parts[at + d];
    total = keep * total + add * stat.y;
    top = higher;
  }
  let x = sum / total;
  @if(vec4) { out[row * HEAD_VEC4 + d] = x; }
  @else {
    for (var c = 0u; c < 4u; c++) {
      if (4u * d + c < params.head_dim) { out[row * params.head_dim + 4u * d + c] = x[c]; }
    }
  }
}
