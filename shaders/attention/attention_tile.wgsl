// Attention, forward, in workgroup tiles: out = softmax(scale q k^T) v, lse = log(sum(exp(scale q
// k^T))).
//
// The same function as attention.wgsl (see there for shapes, positions, documents and numerics), for GPUs,
// with heads up to 256 wide. One workgroup of 64 computes 32 neighbouring query rows of one head and meets
// the keys 32 at a time (lib/tile32): scores in registers, their weights through workgroup memory, results in
// registers.
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, keys_below};
@if(seq_idx) import package::lib::sight::{query_documents, key_documents};
import package::lib::tile32::{PITCH, own_tile, other_tile, tile_rows, tile_dots, tile_put_weights, tile_sums};

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4f>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
@if(seq_idx) @group(0) @binding(5) var<storage, read> seq_idx: array<i32>;

struct Params {
  batch: u32,
  seqlen: u32,
  kv_seqlen: u32,
  nheads: u32,
  nkv_heads: u32,
  turn: u32, // what a query sees: lib/sight
  early: i32,
  reach: i32,
  limit: u32,
  q_docs: u32,
  k_docs: u32,
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override HEAD_VEC4: u32 = 32;

const HIDDEN: f32 = -1e30;
const MAX_SLABS: u32 = 8; // of 32 dimensions

var<workgroup> lane_rows: array<vec4f, 64>; // [y][x]: what a lane knows about its four rows

// Rows past the end repeat the last one: they are masked or not stored. Dimensions past the end are zeros.
fn stage_queries(b: u32, h: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let t = min(first + i / 8u, params.seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = q[((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4 + d]; }
    own_tile[i / 8u * PITCH + i % 8u] = params.scale * x;
  }
}

fn stage_keys(b: u32, hkv: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let j = min(first + i / 8u, params.kv_seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = k[((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4 + d]; }
    other_tile[i / 8u * PITCH + i % 8u] = x;
  }
}

fn stage_values(b: u32, hkv: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let j = min(first + i / 8u, params.kv_seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = v[((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4 + d]; }
    other_tile[i / 8u * PITCH + i % 8u] = x;
  }
}

fn largest(s: vec4f) -> f32 {
  return max(max(s.x, s.y), max(s.z, s.w));
}

@compute @workgroup_size(64)
fn attention_tile(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = workgroup_index(wid, nwg);
  let ntiles = (params.seqlen + 31u) / 32u;
  let h = (tile / ntiles) % params.nheads;
  let b = tile / (ntiles * params.nheads);
  if (b >= params.batch) { return; }
  let hkv = h / (params.nheads / params.nkv_heads);
  let first = (tile % ntiles) * 32u;
  let x = lane % 8u;
  let y = lane / 8u;
  let t = tile_rows(first, y);
  let count = keys_seen(t);
  @if(seq_idx) let mine = query_documents(b, t);

  let nslabs = (HEAD_VEC4 + 7u) / 8u;
  var o: array<mat4x4f, MAX_SLABS>;
  var top = vec4f(HIDDEN);
  var total = vec4f(); // over the keys of this lane only
  let end = keys_below(first + 32u);
  for (var j = 0u; j < end; j += 32u) {
    var s = mat4x4f();
    for (var slab = 0u; slab < nslabs; slab++) {
      stage_queries(b, h, first, slab, lane);
      stage_keys(b, hkv, j, slab, lane);
      workgroupBarrier();
      s = tile_dots(s, x, y);
      workgroupBarrier();
    }
    let key = tile_rows(j, x);
    @if(seq_idx) let others = key_documents(b, key);
    var seen = array<vec4<bool>, 4>();
    for (var r = 0u; r < 4u; r++) {
      seen[r] = vec4u(count[r]) > key;
      @if(seq_idx) seen[r] &= others == vec4i(mine[r]);
      s[r] = select(vec4f(HIDDEN), s[r], seen[r]);
    }
    lane_rows[lane] = vec4f(largest(s[0]), largest(s[1]), largest(s[2]), largest(s[3]));
    workgroupBarrier();
    var new_top = top;
    for (var i = 0u; i < 8u; i++) {
      new_top = max(new_top, lane_rows[y * 8u + i]);
    }
    let decay = exp(top - new_top);
    top = new_top;
    for (var r = 0u; r < 4u; r++) {
      s[r] = select(vec4f(), exp(s[r] - top[r]), seen[r]);
    }
    total = total * decay + vec4f(1.0) * s; // a row vector of ones: sums of the columns
    tile_put_weights(s, x, y);
    for (var slab = 0u; slab < nslabs; slab++) {
      stage_values(b, hkv, j, slab, lane);
      workgroupBarrier();
      let old = o[slab];
      let kept = mat4x4f(old[0] * decay.x, old[1] * decay.y, old[2] * decay.z, old[3] * decay.w);
      o[slab] = tile_sums(kept, x, y);
      workgroupBarrier();
    }
  }

  lane_rows[lane] = total;
  workgroupBarrier();
  total = vec4f();
  for (var i = 0u; i < 8u; i++) {
    total += lane_rows[y * 8u + i];
  }
  total = max(total, vec4f(1e-30)); // a row that sees nothing gives zeros
  for (var r = 0u; r < 4u; r++) {
    if (t[r] < params.seqlen) {
      let at = ((b * params.seqlen + t[r]) * params.nheads + h) * HEAD_VEC4;
      for (var d = x; d < HEAD_VEC4; d += 8u) {
        out[at + d] = o[d / 8u][r] / total[r];
      }
      if (x == 0u) {
        lse[(b * params.nheads + h) * params.seqlen + t[r]] = top[r] + log(total[r]);
      }
    }
  }
}
