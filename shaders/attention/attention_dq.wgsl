// Attention, backward to the queries. With p = exp(scale q k^T - lse) and dp = dout v^T:
//
//   dq = scale * ds k, ds = p * (dp - delta)
//   q, dout, dq [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32
//   [B, L]
//
// What a query sees, heads, documents and the sharing of the work are those of attention.wgsl: a team
// (lib/team) owns 16 query rows and 16 * LANES dimensions of their gradient, and meets the keys 4 * LANES at
// a time. All arithmetic in f32. Masked weights are set to zero after exp. Source: Dao 2023 (arXiv
// 2307.08691), algorithm 2.
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, keys_below};
@if(seq_idx) import package::lib::sight::{query_documents, key_documents};
import package::lib::team::{LANES, TEAM_ROWS, Tile, source_lane, tile_add, loaded_rows, row_order, tile_row};
@if(subgroups) import package::lib::team::spread;
@if(subgroups && octo) import package::lib::team::source_tile;
@if(subgroups && !octo) import package::lib::team::next_tile;

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
  four: u32, // 4, the rows of a matrix
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

@if(subgroups) fn query_rows(at: vec4u, d: u32) -> Tile {
  @if(octo) return spread(q[at.x + d], q[at.y + d]);
  @else return spread(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

@if(subgroups) fn gradient_rows(at: vec4u, d: u32) -> Tile {
  @if(octo) return spread(dout[at.x + d], dout[at.y + d]);
  @else return spread(dout[at.x + d], dout[at.y + d], dout[at.z + d], dout[at.w + d]);
}

// (lse, delta, 0, 0) of every row.
@if(subgroups) fn row_stats(at: vec4u) -> Tile {
  let zero = vec2f();
  @if(octo) return spread(vec4f(stats[at.x], zero), vec4f(stats[at.y], zero));
  @else return spread(vec4f(stats[at.x], zero), vec4f(stats[at.y], zero), vec4f(stats[at.z], zero),
    vec4f(stats[at.w], zero));
}

fn store(at: u32, d: u32, x: vec4f) {
  if (d < HEAD_VEC4) { dq[at + d] = params.scale * x; }
}

fn keys(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(k[at.x + d], k[at.y + d], k[at.z + d], k[at.w + d]);
}

// Where rows of k and v begin; past the end the last row again.
fn key_rows(head: u32, j: vec4u) -> vec4u {
  return (head + min(j, vec4u(params.kv_seqlen - 1u)) * params.nkv_heads) * HEAD_VEC4;
}

// ds of four rows; `known` has their (lse, delta, 0, 0).
fn slopes(s: mat4x4f, dp: mat4x4f, known: mat4x4f, b: u32, row: vec4u, key: vec4u) -> mat4x4f {
  let count = keys_seen(row);
  var seen = array<vec4<bool>, 4>(
    vec4u(count.x) > key, vec4u(count.y) > key, vec4u(count.z) > key, vec4u(count.w) > key);
  @if(seq_idx) let own = query_documents(b, row);
  @if(seq_idx) let other = key_documents(b, key);
  @if(seq_idx) seen = array<vec4<bool>, 4>(seen[0] & (vec4i(own.x) == other),
    seen[1] & (vec4i(own.y) == other), seen[2] & (vec4i(own.z) == other), seen[3] & (vec4i(own.w) == other));
  return mat4x4f(slope(s[0], dp[0], known[0], seen[0]), slope(s[1], dp[1], known[1], seen[1]),
    slope(s[2], dp[2], known[2], seen[2]), slope(s[3], dp[3], known[3], seen[3]));
}
fn slope(s: vec4f, dp: vec4f, known: vec4f, seen: vec4<bool>) -> vec4f {
  // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
  let p = exp(min(params.scale * s - known.x, vec4f()));
  return select(vec4f(), p * (dp - known.y), seen);
}

@if(subgroups) @compute @workgroup_size(WG)
fn attention_dq(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let team = workgroup_index(wid, nwg) * (WG / LANES) + index / LANES;
  let lane = index % LANES;
  let slabs = (HEAD_VEC4 + 4u * LANES - 1u) / (4u * LANES);
  let tile = team / slabs;
  let ntiles = (params.seqlen + TEAM_ROWS - 1u) / TEAM_ROWS;
  let h = (tile / ntiles) % params.nheads;
  let b = tile / (ntiles * params.nheads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * TEAM_ROWS;
  let head = b * params.kv_seqlen * params.nkv_heads + h / (params.nheads / params.nkv_heads);
  let row = first + row_order(lane);
  let queries = min(first + loaded_rows(lane), vec4u(params.seqlen - 1u));
  let query_at = ((b * params.seqlen + queries) * params.nheads + h) * HEAD_VEC4;
  let known = row_stats((b * params.nheads + h) * params.seqlen + queries);
  // The vectors of a result that this lane sums; those past the end of a row are not stored.
  let column = team % slabs * 4u * LANES + lane + vec4u(0u, 1u, 2u, 3u) * LANES;
  let d = min(column, vec4u(HEAD_VEC4 - 1u));

  var x0 = Tile();
  var x1 = Tile();
  var x2 = Tile();
  var x3 = Tile();
  let end = keys_below(first + TEAM_ROWS);
  for (var j = 0u; j < end; j += 4u * LANES) {
    let key = j + 4u * lane + vec4u(0u, 1u, 2u, 3u);
    let at = key_rows(head, key);
    var s = Tile();
    var dp = Tile();
    for (var i = 0u; i < HEAD_VEC4; i++) {
      let values = mat4x4f(v[at.x + i], v[at.y + i], v[at.z + i], v[at.w + i]);
      s = tile_add(s, query_rows(query_at, i), transpose(keys(at, i)));
      dp = tile_add(dp, gradient_rows(query_at, i), transpose(values));
    }
    var ds = Tile(slopes(s.a, dp.a, known.a, b, row, key), slopes(s.b, dp.b, known.b, b, row + 4u, key),
      slopes(s.c, dp.c, known.c, b, row + 8u, key), slopes(s.d, dp.d, known.d, b, row + 12u, key));
    for (var i = 0u; i < params.four * (LANES / 4u); i++) {
      @if(octo) let w = source_tile(ds, i);
      @else let w = ds;
      let source = key_rows(head, j + 4u * source_lane(lane, i) + vec4u(0u, 1u, 2u, 3u));
      x0 = tile_add(x0, w, keys(source, d.x));
      if (HEAD_VEC4 > LANES) { x1 = tile_add(x1, w, keys(source, d.y)); }
      if (HEAD_VEC4 > 2u * LANES) { x2 = tile_add(x2, w, keys(source, d.z)); }
      if (HEAD_VEC4 > 3u * LANES) { x3 = tile_add(x3, w, keys(source, d.w)); }
      @if(!octo) ds = next_tile(ds, i);
    }
  }

  for (var i = 0u; i < 4u * params.four; i++) {
    let t = first + i;
    if (t < params.seqlen) {
      let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
      store(at, column.x, tile_row(x0, i, lane));
      if (HEAD_VEC4 > LANES) { store(at, column.y, tile_row(x1, i, lane)); }
      if (HEAD_VEC4 > 2u * LANES) { store(at, column.z, tile_row(x2, i, lane)); }
      if (HEAD_VEC4 > 3u * LANES) { store(at, column.w, tile_row(x3, i, lane)); }
    }
  }
}
