// Attention, backward to the queries, in workgroup tiles: dq = scale * ds k, ds = p * (dout v^T -
// delta).
//
// The same function as attention_dq.wgsl (see there), for GPUs, heads up to 256 wide. One workgroup of
// 64 computes 32 neighbouring query rows of one head and meets the keys 32 at a time (lib/tile32).
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, keys_below};
@if(seq_idx) import package::lib::sight::{query_documents, key_documents};
import package::lib::tile32::{PITCH, own_tile, other_tile, tile_rows, tile_dots, tile_put_weights, tile_sums};

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read> dout: array<vec4f>;
@group(0) @binding(4) var<storage, read> stats: array<vec2f>;
@group(0) @binding(5) var<storage, read_write> dq: array<vec4f>;
@if(seq_idx) @group(0) @binding(6) var<storage, read> seq_idx: array<i32>;

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

const MAX_SLABS: u32 = 8; // of 32 dimensions

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

fn stage_gradients(b: u32, h: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let t = min(first + i / 8u, params.seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = dout[((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4 + d]; }
    own_tile[i / 8u * PITCH + i % 8u] = x;
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

@compute @workgroup_size(64)
fn attention_tile_dq(
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
  let row = (b * params.nheads + h) * params.seqlen + min(t, vec4u(params.seqlen - 1u));
  var stat = array<vec2f, 4>(stats[row.x], stats[row.y], stats[row.z], stats[row.w]);
  let count = keys_seen(t);
  @if(seq_idx) let mine = query_documents(b, t);

  let nslabs = (HEAD_VEC4 + 7u) / 8u;
  var sums: array<mat4x4f, MAX_SLABS>;
  let end = keys_below(first + 32u);
  for (var j = 0u; j < end; j += 32u) {
    var s = mat4x4f();
    var dp = mat4x4f();
    for (var slab = 0u; slab < nslabs; slab++) {
      stage_queries(b, h, first, slab, lane);
      stage_keys(b, hkv, j, slab, lane);
      workgroupBarrier();
      s = tile_dots(s, x, y);
      workgroupBarrier();
      stage_gradients(b, h, first, slab, lane);
      stage_values(b, hkv, j, slab, lane);
      workgroupBarrier();
      dp = tile_dots(dp, x, y);
      workgroupBarrier();
    }
    let key = tile_rows(j, x);
    @if(seq_idx) let others = key_documents(b, key);
    for (var r = 0u; r < 4u; r++) {
      var seen = vec4u(count[r]) > key;
      @if(seq_idx) seen &= others == vec4i(mine[r]);
      // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
      s[r] = select(vec4f(), exp(min(s[r] - stat[r].x, vec4f())) * (dp[r] - stat[r].y), seen);
    }
    tile_put_weights(s, x, y);
    for (var slab = 0u; slab < nslabs; slab++) {
      stage_keys(b, hkv, j, slab, lane);
      workgroupBarrier();
      sums[slab] = tile_sums(sums[slab], x, y);
      workgroupBarrier();
    }
  }

  for (var r = 0u; r < 4u; r++) {
    if (t[r] < params.seqlen) {
      let at = ((b * params.seqlen + t[r]) * params.nheads + h) * HEAD_VEC4;
      for (var d = x; d < HEAD_VEC4; d += 8u) {
        dq[at + d] = params.scale * sums[d / 8u][r];
      }
    }
  }
}
