// Attention, backward to keys and values. With p = exp(scale q k^T - lse) and ds = p * (dout v^T - delta):
//
//   dv = sum over queries of p dout, dk = scale * sum over queries of ds q, both over all query heads of the
//   group
//   q, dout [B, L, Hq, Dh] · k, v, dk, dv [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32
//   [B, L]
//
// What a query sees, heads and documents are those of attention.wgsl. A team (lib/team) owns 16 key rows of a
// key/value head and 16 * LANES dimensions of their gradients; it goes through the heads of the group and
// meets the queries that may see its keys 4 * LANES at a time. The order of the sums is fixed and nothing is
// added atomically. All arithmetic in f32.
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, first_to_see};
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
  four: u32, // 4, the rows of a matrix
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

@if(subgroups) fn key_rows(at: vec4u, d: u32) -> Tile {
  @if(octo) return spread(k[at.x + d], k[at.y + d]);
  @else return spread(k[at.x + d], k[at.y + d], k[at.z + d], k[at.w + d]);
}

@if(subgroups) fn value_rows(at: vec4u, d: u32) -> Tile {
  @if(octo) return spread(v[at.x + d], v[at.y + d]);
  @else return spread(v[at.x + d], v[at.y + d], v[at.z + d], v[at.w + d]);
}

fn queries(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

fn gradients(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(dout[at.x + d], dout[at.y + d], dout[at.z + d], dout[at.w + d]);
}

fn store(at: u32, d: u32, x: vec4f, y: vec4f) {
  if (d < HEAD_VEC4) {
    dk[at + d] = params.scale * x;
    dv[at + d] = y;
  }
}

// Where rows of q and dout begin; past the end the last row again.
fn query_rows(b: u32, h: u32, t: vec4u) -> vec4u {
  return ((b * params.seqlen + min(t, vec4u(params.seqlen - 1u))) * params.nheads + h) * HEAD_VEC4;
}

// p of four keys; `row` are the queries of this lane and `lse` theirs.
fn weights(s: mat4x4f, lse: vec4f, b: u32, key: vec4u, row: vec4u) -> mat4x4f {
  let last = select(vec4u(), keys_seen(row), row < vec4u(params.seqlen));
  var seen = array<vec4<bool>, 4>(
    vec4u(key.x) < last, vec4u(key.y) < last, vec4u(key.z) < last, vec4u(key.w) < last);
  @if(seq_idx) let own = key_documents(b, key);
  @if(seq_idx) let other = query_documents(b, row);
  @if(seq_idx) seen = array<vec4<bool>, 4>(seen[0] & (vec4i(own.x) == other),
    seen[1] & (vec4i(own.y) == other), seen[2] & (vec4i(own.z) == other), seen[3] & (vec4i(own.w) == other));
  return mat4x4f(weight(s[0], lse, seen[0]), weight(s[1], lse, seen[1]), weight(s[2], lse, seen[2]),
    weight(s[3], lse, seen[3]));
}
fn weight(s: vec4f, lse: vec4f, seen: vec4<bool>) -> vec4f {
  // The exponent is held at 0: the score of a masked key may exceed lse by any amount.
  return select(vec4f(), exp(min(params.scale * s - lse, vec4f())), seen);
}
fn slopes(p: mat4x4f, dp: mat4x4f, delta: vec4f) -> mat4x4f {
  return mat4x4f(p[0] * (dp[0] - delta), p[1] * (dp[1] - delta), p[2] * (dp[2] - delta),
    p[3] * (dp[3] - delta));
}

@if(subgroups) @compute @workgroup_size(WG)
fn attention_dkv(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) index: u32,
) {
  let team = workgroup_index(wid, nwg) * (WG / LANES) + index / LANES;
  let lane = index % LANES;
  let slabs = (HEAD_VEC4 + 4u * LANES - 1u) / (4u * LANES);
  let tile = team / slabs;
  let ntiles = (params.kv_seqlen + TEAM_ROWS - 1u) / TEAM_ROWS;
  let hkv = (tile / ntiles) % params.nkv_heads;
  let b = tile / (ntiles * params.nkv_heads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * TEAM_ROWS;
  let key = first + row_order(lane);
  let loaded = min(first + loaded_rows(lane), vec4u(params.kv_seqlen - 1u));
  let key_at = ((b * params.kv_seqlen + loaded) * params.nkv_heads + hkv) * HEAD_VEC4;
  // The vectors of the gradients that this lane sums; those past the end of a row are not stored.
  let column = team % slabs * 4u * LANES + lane + vec4u(0u, 1u, 2u, 3u) * LANES;
  let d = min(column, vec4u(HEAD_VEC4 - 1u));

  var x0 = Tile();
  var x1 = Tile();
  var x2 = Tile();
  var x3 = Tile();
  var y0 = Tile();
  var y1 = Tile();
  var y2 = Tile();
  var y3 = Tile();
  let start = first_to_see(first);
  let group = params.nheads / params.nkv_heads;
  for (var h = hkv * group; h < (hkv + 1u) * group; h++) {
    for (var t = start; t < params.seqlen; t += 4u * LANES) {
      let row = t + 4u * lane + vec4u(0u, 1u, 2u, 3u);
      let at = query_rows(b, h, row);
      var s = Tile();
      var dp = Tile();
      for (var i = 0u; i < HEAD_VEC4; i++) {
        s = tile_add(s, key_rows(key_at, i), transpose(queries(at, i)));
        dp = tile_add(dp, value_rows(key_at, i), transpose(gradients(at, i)));
      }
      let i = (b * params.nheads + h) * params.seqlen + min(row, vec4u(params.seqlen - 1u));
      let known = transpose(mat4x2f(stats[i.x], stats[i.y], stats[i.z], stats[i.w])); // lse, delta
      var p = Tile(weights(s.a, known[0], b, key, row), weights(s.b, known[0], b, key + 4u, row),
        weights(s.c, known[0], b, key + 8u, row), weights(s.d, known[0], b, key + 12u, row));
      var ds = Tile(slopes(p.a, dp.a, known[1]), slopes(p.b, dp.b, known[1]), slopes(p.c, dp.c, known[1]),
        slopes(p.d, dp.d, known[1]));
      for (var i = 0u; i < params.four * (LANES / 4u); i++) {
        @if(octo) let wp = source_tile(p, i);
        @else let wp = p;
        @if(octo) let ws = source_tile(ds, i);
        @else let ws = ds;
        let source = query_rows(b, h, t + 4u * source_lane(lane, i) + vec4u(0u, 1u, 2u, 3u));
        x0 = tile_add(x0, ws, queries(source, d.x));
        y0 = tile_add(y0, wp, gradients(source, d.x));
        if (HEAD_VEC4 > LANES) {
          x1 = tile_add(x1, ws, queries(source, d.y));
          y1 = tile_add(y1, wp, gradients(source, d.y));
        }
        if (HEAD_VEC4 > 2u * LANES) {
          x2 = tile_add(x2, ws, queries(source, d.z));
          y2 = tile_add(y2, wp, gradients(source, d.z));
        }
        if (HEAD_VEC4 > 3u * LANES) {
          x3 = tile_add(x3, ws, queries(source, d.w));
          y3 = tile_add(y3, wp, gradients(source, d.w));
        }
        @if(!octo) p = next_tile(p, i);
        @if(!octo) ds = next_tile(ds, i);
      }
    }
  }

  for (var i = 0u; i < 4u * params.four; i++) {
    let j = first + i;
    if (j < params.kv_seqlen) {
      let at = ((b * params.kv_seqlen + j) * params.nkv_heads + hkv) * HEAD_VEC4;
      store(at, column.x, tile_row(x0, i, lane), tile_row(y0, i, lane));
      if (HEAD_VEC4 > LANES) { store(at, column.y, tile_row(x1, i, lane), tile_row(y1, i, lane)); }
      if (HEAD_VEC4 > 2u * LANES) { store(at, column.z, tile_row(x2, i, lane), tile_row(y2, i, lane)); }
      if (HEAD_VEC4 > 3u * LANES) { store(at, column.w, tile_row(x3, i, lane), tile_row(y3, i, lane)); }
    }
  }
}
