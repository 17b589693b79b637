// Attention, backward to keys and values, in workgroup tiles: dv = p^T dout, dk = scale * ds^T q,
// summed over the query heads of the group, ds = p * (dout v^T - delta).
//
// The same function as attention_dkv.wgsl (see there), for GPUs, heads up to 256 wide. One workgroup
// of 64 owns 32 neighbouring keys of one key/value head and meets the queries of the group's heads 32 at a
// time (lib/tile32).
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, first_to_see};
@if(seq_idx) import package::lib::sight::{query_documents, key_documents};
import package::lib::tile32::{PITCH, own_tile, other_tile, tile_rows, tile_dots, tile_put_weights, tile_sums};

@group(0) @binding(0) var<storage, read> q: array<vec4f>;
@group(0) @binding(1) var<storage, read> k: array<vec4f>;
@group(0) @binding(2) var<storage, read> v: array<vec4f>;
@group(0) @binding(3) var<storage, read> dout: array<vec4f>;
@group(0) @binding(4) var<storage, read> stats: array<vec2f>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4f>;
@group(0) @binding(6) var<storage, read_write> dv: array<vec4f>;
@if(seq_idx) @group(0) @binding(7) var<storage, read> seq_idx: array<i32>;

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
    other_tile[i / 8u * PITCH + i % 8u] = x;
  }
}

fn stage_gradients(b: u32, h: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let t = min(first + i / 8u, params.seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = dout[((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4 + d]; }
    other_tile[i / 8u * PITCH + i % 8u] = x;
  }
}

fn stage_keys(b: u32, hkv: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let j = min(first + i / 8u, params.kv_seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = k[((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4 + d]; }
    own_tile[i / 8u * PITCH + i % 8u] = params.scale * x;
  }
}

fn stage_values(b: u32, hkv: u32, first: u32, slab: u32, lane: u32) {
  for (var i = lane; i < 256u; i += 64u) {
    let d = slab * 8u + i % 8u;
    let j = min(first + i / 8u, params.kv_seqlen - 1u);
    var x = vec4f();
    if (d < HEAD_VEC4) { x = v[((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4 + d]; }
    own_tile[i / 8u * PITCH + i % 8u] = x;
  }
}

@compute @workgroup_size(64)
fn attention_tile_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = workgroup_index(wid, nwg);
  let ntiles = (params.kv_seqlen + 31u) / 32u;
  let hkv = (tile / ntiles) % params.nkv_heads;
  let b = tile / (ntiles * params.nkv_heads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * 32u;
  let x = lane % 8u;
  let y = lane / 8u;
  let key = tile_rows(first, y);
  @if(seq_idx) let mine = key_documents(b, key);

  let nslabs = (HEAD_VEC4 + 7u) / 8u;
  var key_sums: array<mat4x4f, MAX_SLABS>;
  var value_sums: array<mat4x4f, MAX_SLABS>;
  let start = first_to_see(first);
  let group = params.nheads / params.nkv_heads;
  for (var h = hkv * group; h < (hkv + 1u) * group; h++) {
    for (var i = start; i < params.seqlen; i += 32u) {
      var s = mat4x4f();
      var dp = mat4x4f();
      for (var slab = 0u; slab < nslabs; slab++) {
        stage_keys(b, hkv, first, slab, lane);
        stage_queries(b, h, i, slab, lane);
        workgroupBarrier();
        s = tile_dots(s, x, y);
        workgroupBarrier();
        stage_values(b, hkv, first, slab, lane);
        stage_gradients(b, h, i, slab, lane);
        workgroupBarrier();
        dp = tile_dots(dp, x, y);
        workgroupBarrier();
      }
      let t = tile_rows(i, x);
      let count = select(vec4u(), keys_seen(t), t < vec4u(params.seqlen));
      let row = (b * params.nheads + h) * params.seqlen + min(t, vec4u(params.seqlen - 1u));
      let stat = mat4x2f(stats[row.x], stats[row.y], stats[row.z], stats[row.w]);
      let by_kind = transpose(stat); // lse and delta of the four queries
      @if(seq_idx) let others = query_documents(b, t);
      for (var r = 0u; r < 4u; r++) {
        var seen = count > vec4u(key[r]);
        @if(seq_idx) seen &= others == vec4i(mine[r]);
        // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
        s[r] = select(vec4f(), exp(min(s[r] - by_kind[0], vec4f())), seen);
        dp[r] = s[r] * (dp[r] - by_kind[1]);
      }
      tile_put_weights(s, x, y);
      for (var slab = 0u; slab < nslabs; slab++) {
        stage_gradients(b, h, i, slab, lane);
        workgroupBarrier();
        value_sums[slab] = tile_sums(value_sums[slab], x, y);
        workgroupBarrier();
      }
      tile_put_weights(dp, x, y);
      for (var slab = 0u; slab < nslabs; slab++) {
        stage_queries(b, h, i, slab, lane);
        workgroupBarrier();
        key_sums[slab] = tile_sums(key_sums[slab], x, y);
        workgroupBarrier();
      }
    }
  }

  for (var r = 0u; r < 4u; r++) {
    if (key[r] < params.kv_seqlen) {
      let at = ((b * params.kv_seqlen + key[r]) * params.nkv_heads + hkv) * HEAD_VEC4;
      for (var d = x; d < HEAD_VEC4; d += 8u) {
        dk[at + d] = params.scale * key_sums[d / 8u][r];
        dv[at + d] = value_sums[d / 8u][r];
      }
    }
  }
}
