// Attention of a few new tokens over a cache: out = softmax(scale q K^T) V over positions 0 .. position + t.
//
//   q, out [B, L, Hq, Dh] · caches [B, Hkv, Lmax, Dh] · position u32 [1], index of the first new token,
//   already in the cache
//
// Query t sees the keys up to position + t. Query head h reads key/value head h / (Hq / Hkv). Condition
// `vec4`: Dh is a multiple of four; otherwise the tail of the last vector is filled with zeros. HEAD_VEC4 =
// ceil(Dh / 4).
//
// One workgroup computes one row of out: lane i walks over the keys i, i + WG, ... with an online softmax in
// registers, and the lanes' results are combined in the order of the lanes. Masks are lengths here, so no
// infinity arises; an idle lane has weight zero.
//
// Condition `parts`: the keys are cut into parts of `length`, a workgroup has one of them, and out is
// [B, L, Hq, nparts, HEAD_VEC4 + 1] of vec4f: what decode_merge puts together. Parts beyond the last key are
// left as they are. Otherwise there is one part.
//
// Condition `fp8` (with `vec4`): the caches are E4M3 codes, four to a word. What the codes of keys are
// multiplied with is in `scale`, that of values is v_scale (1 otherwise).
import package::lib::index::workgroup_index;
@if(fp8) import package::lib::e4m3::four_e4m3;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

struct Params {
  rows: u32,
  seqlen: u32,
  capacity: u32,
  nheads: u32,
  nkv_heads: u32,
  head_dim: u32,
  length: u32,
  nparts: u32,
  scale: f32,
  v_scale: f32,
}

@group(0) @binding(1) var<storage, read> position: array<u32>;
@if(vec4) @group(0) @binding(0) var<storage, read> q: array<vec4f>;
@else @group(0) @binding(0) var<storage, read> q: array<f32>;
@if(fp8) @group(0) @binding(2) var<storage, read> key: array<u32>;
@if(vec4 && !fp8) @group(0) @binding(2) var<storage, read> key: array<vec4f>;
@if(!vec4 && !fp8) @group(0) @binding(2) var<storage, read> key: array<f32>;
@if(fp8) @group(0) @binding(3) var<storage, read> value: array<u32>;
@if(vec4 && !fp8) @group(0) @binding(3) var<storage, read> value: array<vec4f>;
@if(!vec4 && !fp8) @group(0) @binding(3) var<storage, read> value: array<f32>;
@if(vec4 || parts) @group(0) @binding(4) var<storage, read_write> out: array<vec4f>;
@else @group(0) @binding(4) var<storage, read_write> out: array<f32>;
@group(1) @binding(0) var<uniform> params: Params;

// Arrays of a function cannot be sized by an override; `wide` heads have more than 64 components.
@if(wide) const MAX_VEC4: u32 = 64;
@else const MAX_VEC4: u32 = 16;
const MAX_LANES: u32 = 16;

var<workgroup> largest: array<f32, MAX_LANES>;
var<workgroup> total: array<f32, MAX_LANES>;
var<workgroup> partial: array<vec4f, 1008>; // lanes * HEAD_VEC4, at most 15.75 KiB

fn query_at(row: u32, d: u32) -> vec4f {
  @if(vec4) return q[row * HEAD_VEC4 + d];
  @else return vec4f(q_scalar(row, 4u * d), q_scalar(row, 4u * d + 1u),
    q_scalar(row, 4u * d + 2u), q_scalar(row, 4u * d + 3u));
}

fn key_at(row: u32, d: u32) -> vec4f {
  @if(fp8) return four_e4m3(key[row * HEAD_VEC4 + d]);
  @if(vec4 && !fp8) return key[row * HEAD_VEC4 + d];
  @if(!vec4 && !fp8) return vec4f(k_scalar(row, 4u * d), k_scalar(row, 4u * d + 1u),
    k_scalar(row, 4u * d + 2u), k_scalar(row, 4u * d + 3u));
}

fn value_at(row: u32, d: u32) -> vec4f {
  @if(fp8) return four_e4m3(value[row * HEAD_VEC4 + d]);
  @if(vec4 && !fp8) return value[row * HEAD_VEC4 + d];
  @if(!vec4 && !fp8) return vec4f(v_scalar(row, 4u * d), v_scalar(row, 4u * d + 1u),
    v_scalar(row, 4u * d + 2u), v_scalar(row, 4u * d + 3u));
}

@if(!vec4) fn q_scalar(row: u32, d: u32) -> f32 {
  if (d >= params.head_dim) { return 0.0; }
  return q[row * params.head_dim + d];
}

@if(!vec4 && !fp8) fn k_scalar(row: u32, d: u32) -> f32 {
  if (d >= params.head_dim) { return 0.0; }
  return key[row * params.head_dim + d];
}

@if(!vec4 && !fp8) fn v_scalar(row: u32, d: u32) -> f32 {
  if (d >= params.head_dim) { return 0.0; }
  return value[row * params.head_dim + d];
}

@if(!parts) fn store(row: u32, d: u32, x: vec4f) {
  @if(vec4) { out[row * HEAD_VEC4 + d] = x; }
  @else {
    for (var i = 0u; i < 4u; i++) {
      if (4u * d + i < params.head_dim) { out[row * params.head_dim + 4u * d + i] = x[i]; }
    }
  }
}

@compute @workgroup_size(WG)
fn decode_attention(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let group = workgroup_index(wid, nwg);
  let row = group % params.rows; // (b * L + t) * Hq + h
  let part = group / params.rows;
  if (part >= params.nparts) { return; }
  let head = row % params.nheads;
  let t = row / params.nheads % params.seqlen;
  let b = row / (params.nheads * params.seqlen);
  let first = (b * params.nkv_heads + head / (params.nheads / params.nkv_heads)) * params.capacity;
  let begin = part * params.length;
  let end = min(begin + params.length, min(position[0] + t + 1u, params.capacity));
  if (begin >= end) { return; }

  var query: array<vec4f, MAX_VEC4>;
  var sum: array<vec4f, MAX_VEC4>;
  for (var d = 0u; d < HEAD_VEC4; d++) { query[d] = params.scale * query_at(row, d); }
  var peak = -1e30;
  var weight = 0.0;
  for (var j = begin + lane; j < end; j += WG) {
    var dots = vec4f();
    for (var d = 0u; d < HEAD_VEC4; d++) { dots += query[d] * key_at(first + j, d); }
    let score = dots.x + dots.y + dots.z + dots.w;
    let higher = max(peak, score);
    let keep = exp(peak - higher);
    let p = exp(score - higher);
    for (var d = 0u; d < HEAD_VEC4; d++) { sum[d] = keep * sum[d] + p * value_at(first + j, d); }
    weight = keep * weight + p;
    peak = higher;
  }
  largest[lane] = peak;
  total[lane] = weight;
  for (var d = 0u; d < HEAD_VEC4; d++) { partial[lane * HEAD_VEC4 + d] = sum[d]; }
  workgroupBarrier();

  var top = largest[0];
  for (var i = 1u; i < WG; i++) { top = max(top, largest[i]); }
  var all = 0.0;
  for (var i = 0u; i < WG; i++) { all += exp(largest[i] - top) * total[i]; }
  for (var d = lane; d < HEAD_VEC4; d += WG) {
    var x = vec4f();
    for (var i = 0u; i < WG; i++) { x += exp(largest[i] - top) * partial[i * HEAD_VEC4 + d]; }
    x *= params.v_scale;
    @if(parts) { out[(row * params.nparts + part) * (HEAD_VEC4 + 1u) + d] = x; }
    @else { store(row, d, x / all); }
  }
  @if(parts) {
    if (lane == 0u) {
      out[(row * params.nparts + part) * (HEAD_VEC4 + 1u) + HEAD_VEC4] = vec4f(top, all, 0.0, 0.0);
    }
  }
}
