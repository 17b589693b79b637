// Causal attention, forward: out = softmax(scale q k^T) v, lse = log(sum(exp(scale q k^T))).
//
//   q, out [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · lse [B, Hq, L] · seq_idx i32 [B, L] (condition `seq_idx`)
//
// Query t is at absolute position t + (Lk - L) and sees keys up to there (of its own seq_idx). Query head h reads
// key/value head h / (Hq / Hkv). HEAD_VEC4 = Dh / 4 is at most 16. All arithmetic in f32.
//
// One invocation owns four query rows of a head and walks over the keys in steps of four; one workgroup computes
// 4 WG neighbouring rows of one head and stops at the last key that any of them sees. Rows and results stay in
// registers (lib/slab), no workgroup memory is used: made for adapters where loads and barriers are dear. The
// keys of a step are shared by a quad of lanes where subgroups exist.
//
// Online softmax (Milakov & Gimelshein 2018; Dao 2023, arXiv 2307.08691, algorithm 1). Masked scores are the finite
// -1e30 and their weights are set to zero after exp, so no infinity arises.
import package::lib::index::workgroup_index;
import package::lib::slab::{Slab, Place, next_four, slab_dot, slab_add, slab_scale};
@if(subgroups) import package::lib::slab::spread;

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
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

const HIDDEN: f32 = -1e30;

fn query_rows(at: vec4u, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  return params.scale * mat4x4f(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

fn query_slab(at: vec4u, d: u32) -> Slab {
  return Slab(query_rows(at, d), query_rows(at, d + 1u), query_rows(at, d + 2u), query_rows(at, d + 3u));
}

fn key_rows(at: Place, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  @if(subgroups) return spread(k[at + d]);
  @else return mat4x4f(k[at.x + d], k[at.y + d], k[at.z + d], k[at.w + d]);
}

fn key_slab(at: Place, d: u32) -> Slab {
  return Slab(key_rows(at, d), key_rows(at, d + 1u), key_rows(at, d + 2u), key_rows(at, d + 3u));
}

fn value_rows(at: Place, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  @if(subgroups) return spread(v[at + d]);
  @else return mat4x4f(v[at.x + d], v[at.y + d], v[at.z + d], v[at.w + d]);
}

fn value_slab(at: Place, d: u32) -> Slab {
  return Slab(value_rows(at, d), value_rows(at, d + 1u), value_rows(at, d + 2u), value_rows(at, d + 3u));
}

fn store(at: u32, d: u32, x: vec4f) {
  if (d < HEAD_VEC4) { out[at + d] = x; }
}

fn store_row(at: u32, d: u32, a: vec4f, b: vec4f, c: vec4f, e: vec4f) {
  store(at, d, a);
  store(at, d + 1u, b);
  store(at, d + 2u, c);
  store(at, d + 3u, e);
}

fn store_slab(at: vec4u, live: vec4<bool>, d: u32, x: Slab) {
  if (live.x) { store_row(at.x, d, x.a[0], x.b[0], x.c[0], x.d[0]); }
  if (live.y) { store_row(at.y, d, x.a[1], x.b[1], x.c[1], x.d[1]); }
  if (live.z) { store_row(at.z, d, x.a[2], x.b[2], x.c[2], x.d[2]); }
  if (live.w) { store_row(at.w, d, x.a[3], x.b[3], x.c[3], x.d[3]); }
}

fn largest(s: vec4f) -> f32 {
  return max(max(s.x, s.y), max(s.z, s.w));
}

fn weights(s: vec4f, top: f32, seen: vec4<bool>) -> vec4f {
  return select(vec4f(), exp(s - top), seen);
}

@if(seq_idx)
fn documents(first: u32, at: vec4u) -> vec4i {
  return vec4i(seq_idx[first + at.x], seq_idx[first + at.y], seq_idx[first + at.z], seq_idx[first + at.w]);
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * 4u;
  let nblocks = (params.seqlen + rows - 1u) / rows;
  let h = (tile / nblocks) % params.nheads;
  let b = tile / (nblocks * params.nheads);
  if (b >= params.batch) { return; }
  let first = (tile % nblocks) * rows;
  let wanted = first + lane * 4u + vec4u(0u, 1u, 2u, 3u);
  let live = vec4u(params.seqlen) > wanted;
  let t = min(wanted, vec4u(params.seqlen - 1u)); // rows past the end repeat the last one and are not stored
  let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
  let shift = params.kv_seqlen - params.seqlen;
  let kv_head = b * params.kv_seqlen * params.nkv_heads + h / (params.nheads / params.nkv_heads);
  let last_key = params.kv_seqlen - 1u;
  @if(seq_idx) let document = documents(b * params.seqlen, t);

  let q0 = query_slab(at, 0u);
  let q1 = query_slab(at, 4u);
  let q2 = query_slab(at, 8u);
  let q3 = query_slab(at, 12u);
  var o0 = Slab();
  var o1 = Slab();
  var o2 = Slab();
  var o3 = Slab();
  var top = vec4f(HIDDEN);
  var total = vec4f();
  let end = min(first + rows, params.seqlen) + shift;
  for (var j = 0u; j < end; j += 4u) {
    let place = (kv_head + min(next_four(j, quad), Place(last_key)) * params.nkv_heads) * HEAD_VEC4;
    var s = slab_dot(key_slab(place, 0u), q0);
    if (HEAD_VEC4 > 4u) { s += slab_dot(key_slab(place, 4u), q1); }
    if (HEAD_VEC4 > 8u) { s += slab_dot(key_slab(place, 8u), q2); }
    if (HEAD_VEC4 > 12u) { s += slab_dot(key_slab(place, 12u), q3); }

    let key = j + vec4u(0u, 1u, 2u, 3u);
    var seen0 = key <= vec4u(t.x + shift);
    var seen1 = key <= vec4u(t.y + shift);
    var seen2 = key <= vec4u(t.z + shift);
    var seen3 = key <= vec4u(t.w + shift);
    @if(seq_idx) {
      let others = documents(b * params.seqlen, min(key, vec4u(last_key)));
      seen0 &= others == vec4i(document.x);
      seen1 &= others == vec4i(document.y);
      seen2 &= others == vec4i(document.z);
      seen3 &= others == vec4i(document.w);
    }
    let s0 = select(vec4f(HIDDEN), s[0], seen0);
    let s1 = select(vec4f(HIDDEN), s[1], seen1);
    let s2 = select(vec4f(HIDDEN), s[2], seen2);
    let s3 = select(vec4f(HIDDEN), s[3], seen3);
    let new_top = max(top, vec4f(largest(s0), largest(s1), largest(s2), largest(s3)));
    let decay = exp(top - new_top);
    let p = mat4x4f(weights(s0, new_top.x, seen0), weights(s1, new_top.y, seen1),
      weights(s2, new_top.z, seen2), weights(s3, new_top.w, seen3));
    top = new_top;
    total = total * decay + vec4f(1.0) * p; // a row vector of ones: sums of the columns
    o0 = slab_add(slab_scale(o0, decay), value_slab(place, 0u), p);
    if (HEAD_VEC4 > 4u) { o1 = slab_add(slab_scale(o1, decay), value_slab(place, 4u), p); }
    if (HEAD_VEC4 > 8u) { o2 = slab_add(slab_scale(o2, decay), value_slab(place, 8u), p); }
    if (HEAD_VEC4 > 12u) { o3 = slab_add(slab_scale(o3, decay), value_slab(place, 12u), p); }
  }

  let guarded = max(total, vec4f(1e-30)); // a row that sees nothing gives zeros
  let inverse = 1.0 / guarded;
  store_slab(at, live, 0u, slab_scale(o0, inverse));
  if (HEAD_VEC4 > 4u) { store_slab(at, live, 4u, slab_scale(o1, inverse)); }
  if (HEAD_VEC4 > 8u) { store_slab(at, live, 8u, slab_scale(o2, inverse)); }
  if (HEAD_VEC4 > 12u) { store_slab(at, live, 12u, slab_scale(o3, inverse)); }
  let kept = top + log(guarded);
  let row = (b * params.nheads + h) * params.seqlen + t;
  if (live.x) { lse[row.x] = kept.x; }
  if (live.y) { lse[row.y] = kept.y; }
  if (live.z) { lse[row.z] = kept.z; }
  if (live.w) { lse[row.w] = kept.w; }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
