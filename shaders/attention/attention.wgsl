// Attention, forward: out = softmax(scale q k^T) v, lse = log(sum(exp(scale q k^T))).
//
//   q, out [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · lse [B, Hq, L] · seq_idx i32 [B, L] (condition `seq_idx`)
//
// What a query sees says lib/sight: turn = 0 and reach = Lk - L is causal attention, reach = Lk shows every
// key. Query head h reads key/value head h / (Hq / Hkv). HEAD_VEC4 = Dh / 4. All arithmetic in f32.
//
// A team (lib/team) owns 16 neighbouring query rows of a head and 16 * LANES dimensions of their results; it
// meets the keys 4 * LANES at a time and stops at the last one that a row of it sees. Scores, weights and
// results stay in registers, and no workgroup memory is used: made for adapters where loads and barriers are
// dear. Loops with a bound in a uniform are kept rolled, because every load in the program text costs tens of
// milliseconds of compilation there.
//
// Online softmax (Milakov & Gimelshein 2018; Dao 2023, arXiv 2307.08691, algorithm 1). Masked scores are the
// finite -1e30 and their weights are set to zero after exp, so no infinity arises.
import package::lib::index::workgroup_index;
import package::lib::sight::{keys_seen, keys_below};
@if(seq_idx) import package::lib::sight::{query_documents, key_documents};
import package::lib::team::{LANES, TEAM_ROWS, Tile, source_lane, tile_add};
@if(subgroups) import package::lib::team::{spread, team_max, team_sum};
import package::lib::team::{tile_scale, loaded_rows, row_order, tile_row, row_number};
@if(subgroups && octo) import package::lib::team::source_tile;
@if(subgroups && !octo) import package::lib::team::next_tile;

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
  four: u32, // 4, the rows of a matrix
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

const HIDDEN: f32 = -1e30;

@if(subgroups) fn query_rows(at: vec4u, d: u32) -> Tile {
  @if(octo) return spread(q[at.x + d], q[at.y + d]);
  @else return spread(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

fn value_rows(at: vec4u, d: u32) -> mat4x4f {
  return mat4x4f(v[at.x + d], v[at.y + d], v[at.z + d], v[at.w + d]);
}

fn store(at: u32, d: u32, x: vec4f) {
  if (d < HEAD_VEC4) { out[at + d] = x; }
}

// Where rows of k and v begin; past the end the last row again.
fn key_rows(head: u32, j: vec4u) -> vec4u {
  return (head + min(j, vec4u(params.kv_seqlen - 1u)) * params.nkv_heads) * HEAD_VEC4;
}

// Four rows: their weights, and how their maximum and sum (over the keys of this lane) go on.
struct Weights { p: mat4x4f, top: vec4f, total: vec4f, decay: vec4f }

@if(subgroups)
fn weigh(s: mat4x4f, top: vec4f, total: vec4f, b: u32, row: vec4u, key: vec4u) -> Weights {
  let count = keys_seen(row);
  var seen = array<vec4<bool>, 4>(
    vec4u(count.x) > key, vec4u(count.y) > key, vec4u(count.z) > key, vec4u(count.w) > key);
  @if(seq_idx) let own = query_documents(b, row);
  @if(seq_idx) let other = key_documents(b, key);
  @if(seq_idx) seen = array<vec4<bool>, 4>(seen[0] & (vec4i(own.x) == other),
    seen[1] & (vec4i(own.y) == other), seen[2] & (vec4i(own.z) == other), seen[3] & (vec4i(own.w) == other));
  let hidden = vec4f(HIDDEN);
  let x = params.scale * s;
  let by_key = transpose(mat4x4f(select(hidden, x[0], seen[0]), select(hidden, x[1], seen[1]),
    select(hidden, x[2], seen[2]), select(hidden, x[3], seen[3])));
  let new_top = max(top, team_max(max(max(by_key[0], by_key[1]), max(by_key[2], by_key[3]))));
  let decay = exp(top - new_top);
  let e = transpose(mat4x4f(exp(by_key[0] - new_top), exp(by_key[1] - new_top), exp(by_key[2] - new_top),
    exp(by_key[3] - new_top)));
  let p = mat4x4f(select(vec4f(), e[0], seen[0]), select(vec4f(), e[1], seen[1]),
    select(vec4f(), e[2], seen[2]), select(vec4f(), e[3], seen[3]));
  return Weights(p, new_top, total * decay + vec4f(1.0) * p, decay); // the sums of the columns
}

@if(subgroups) @compute @workgroup_size(WG)
fn attention(
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
  // The vectors of a result that this lane sums; those past the end of a row are not stored.
  let column = team % slabs * 4u * LANES + lane + vec4u(0u, 1u, 2u, 3u) * LANES;
  let d = min(column, vec4u(HEAD_VEC4 - 1u));

  var o0 = Tile();
  var o1 = Tile();
  var o2 = Tile();
  var o3 = Tile();
  var top = mat4x4f(vec4f(HIDDEN), vec4f(HIDDEN), vec4f(HIDDEN), vec4f(HIDDEN));
  var total = mat4x4f();
  let end = keys_below(first + TEAM_ROWS);
  for (var j = 0u; j < end; j += 4u * LANES) {
    let key = j + 4u * lane + vec4u(0u, 1u, 2u, 3u);
    let at = key_rows(head, key);
    var s = Tile();
    for (var i = 0u; i < HEAD_VEC4; i++) {
      let keys = mat4x4f(k[at.x + i], k[at.y + i], k[at.z + i], k[at.w + i]);
      s = tile_add(s, query_rows(query_at, i), transpose(keys));
    }
    let wa = weigh(s.a, top[0], total[0], b, row, key);
    let wb = weigh(s.b, top[1], total[1], b, row + 4u, key);
    let wc = weigh(s.c, top[2], total[2], b, row + 8u, key);
    let wd = weigh(s.d, top[3], total[3], b, row + 12u, key);
    top = mat4x4f(wa.top, wb.top, wc.top, wd.top);
    total = mat4x4f(wa.total, wb.total, wc.total, wd.total);
    let decay = mat4x4f(wa.decay, wb.decay, wc.decay, wd.decay);
    o0 = tile_scale(o0, decay);
    if (HEAD_VEC4 > LANES) { o1 = tile_scale(o1, decay); }
    if (HEAD_VEC4 > 2u * LANES) { o2 = tile_scale(o2, decay); }
    if (HEAD_VEC4 > 3u * LANES) { o3 = tile_scale(o3, decay); }

    s = Tile(wa.p, wb.p, wc.p, wd.p);
    for (var i = 0u; i < params.four * (LANES / 4u); i++) {
      @if(octo) let p = source_tile(s, i);
      @else let p = s;
      let source = key_rows(head, j + 4u * source_lane(lane, i) + vec4u(0u, 1u, 2u, 3u));
      o0 = tile_add(o0, p, value_rows(source, d.x));
      if (HEAD_VEC4 > LANES) { o1 = tile_add(o1, p, value_rows(source, d.y)); }
      if (HEAD_VEC4 > 2u * LANES) { o2 = tile_add(o2, p, value_rows(source, d.z)); }
      if (HEAD_VEC4 > 3u * LANES) { o3 = tile_add(o3, p, value_rows(source, d.w)); }
      @if(!octo) s = next_tile(s, i);
    }
  }

  // A row that sees nothing gives zeros.
  total = mat4x4f(max(team_sum(total[0]), vec4f(1e-30)), max(team_sum(total[1]), vec4f(1e-30)),
    max(team_sum(total[2]), vec4f(1e-30)), max(team_sum(total[3]), vec4f(1e-30)));
  for (var i = 0u; i < 4u * params.four; i++) {
    let t = first + i;
    if (t < params.seqlen) {
      let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
      let sum = row_number(total, i, lane);
      store(at, column.x, tile_row(o0, i, lane) / sum);
      if (HEAD_VEC4 > LANES) { store(at, column.y, tile_row(o1, i, lane) / sum); }
      if (HEAD_VEC4 > 2u * LANES) { store(at, column.z, tile_row(o2, i, lane) / sum); }
      if (HEAD_VEC4 > 3u * LANES) { store(at, column.w, tile_row(o3, i, lane) / sum); }
      if (column.x == 0u) {
        lse[(b * params.nheads + h) * params.seqlen + t] = row_number(top, i, lane) + log(sum);
      }
    }
  }
}
