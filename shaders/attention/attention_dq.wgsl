// Causal attention, backward to the queries. With p = exp(scale q k^T - lse) and dp = dout v^T:
//
//   dq = scale * ds k, ds = p * (dp - delta)
//   q, dout, dq [B, L, Hq, Dh] · k, v [B, Lk, Hkv, Dh] · stats = (lse, delta) [B, Hq, L, 2] · seq_idx i32 [B, L]
//
// Positions, heads, documents and the sharing of the work are those of attention.wgsl: one invocation owns four query
// rows and walks over the keys in steps of four. HEAD_VEC4 = Dh / 4 is at most 16. All arithmetic in f32.
// Masked weights are set to zero after exp. Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
import package::lib::index::workgroup_index;
import package::lib::slab::{Slab, Place, next_four, slab_dot, slab_add, slab_scale};
@if(subgroups) import package::lib::slab::spread;

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
  scale: f32,
}
@group(1) @binding(0) var<uniform> params: Params;

override WG: u32 = 8;
override HEAD_VEC4: u32 = 8;

fn query_rows(at: vec4u, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  return params.scale * mat4x4f(q[at.x + d], q[at.y + d], q[at.z + d], q[at.w + d]);
}

fn query_slab(at: vec4u, d: u32) -> Slab {
  return Slab(query_rows(at, d), query_rows(at, d + 1u), query_rows(at, d + 2u), query_rows(at, d + 3u));
}

fn dout_rows(at: vec4u, d: u32) -> mat4x4f {
  if (d >= HEAD_VEC4) { return mat4x4f(); }
  return mat4x4f(dout[at.x + d], dout[at.y + d], dout[at.z + d], dout[at.w + d]);
}

fn dout_slab(at: vec4u, d: u32) -> Slab {
  return Slab(dout_rows(at, d), dout_rows(at, d + 1u), dout_rows(at, d + 2u), dout_rows(at, d + 3u));
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
  if (d < HEAD_VEC4) { dq[at + d] = x; }
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

// ds of one query row for four keys; the exponent is clamped because a masked score may exceed lse by any amount.
fn slope(s: vec4f, dp: vec4f, stat: vec2f, seen: vec4<bool>) -> vec4f {
  return select(vec4f(), exp(min(s - stat.x, vec4f(0.0))) * (dp - stat.y), seen);
}

@if(seq_idx)
fn documents(first: u32, at: vec4u) -> vec4i {
  return vec4i(seq_idx[first + at.x], seq_idx[first + at.y], seq_idx[first + at.z], seq_idx[first + at.w]);
}

fn attend(tile: u32, lane: u32, quad: u32) {
  let rows = WG * 4u;
  let ntiles = (params.seqlen + rows - 1u) / rows;
  let h = (tile / ntiles) % params.nheads;
  let b = tile / (ntiles * params.nheads);
  if (b >= params.batch) { return; }
  let first = (tile % ntiles) * rows;
  let wanted = first + lane * 4u + vec4u(0u, 1u, 2u, 3u);
  let live = vec4u(params.seqlen) > wanted;
  let t = min(wanted, vec4u(params.seqlen - 1u)); // rows past the end repeat the last one and are not stored
  let at = ((b * params.seqlen + t) * params.nheads + h) * HEAD_VEC4;
  let shift = params.kv_seqlen - params.seqlen;
  let kv_head = b * params.kv_seqlen * params.nkv_heads + h / (params.nheads / params.nkv_heads);
  let last_key = params.kv_seqlen - 1u;
  let row = (b * params.nheads + h) * params.seqlen + t;
  let stat0 = stats[row.x];
  let stat1 = stats[row.y];
  let stat2 = stats[row.z];
  let stat3 = stats[row.w];
  @if(seq_idx) let document = documents(b * params.seqlen, t);

  let q0 = query_slab(at, 0u);
  let q1 = query_slab(at, 4u);
  let q2 = query_slab(at, 8u);
  let q3 = query_slab(at, 12u);
  let g0 = dout_slab(at, 0u);
  let g1 = dout_slab(at, 4u);
  let g2 = dout_slab(at, 8u);
  let g3 = dout_slab(at, 12u);
  var x0 = Slab();
  var x1 = Slab();
  var x2 = Slab();
  var x3 = Slab();
  let end = min(first + rows, params.seqlen) + shift;
  for (var j = 0u; j < end; j += 4u) {
    let place = (kv_head + min(next_four(j, quad), Place(last_key)) * params.nkv_heads) * HEAD_VEC4;
    let k0 = key_slab(place, 0u);
    let k1 = key_slab(place, 4u);
    let k2 = key_slab(place, 8u);
    let k3 = key_slab(place, 12u);
    var s = slab_dot(k0, q0);
    var dp = slab_dot(value_slab(place, 0u), g0);
    if (HEAD_VEC4 > 4u) {
      s += slab_dot(k1, q1);
      dp += slab_dot(value_slab(place, 4u), g1);
    }
    if (HEAD_VEC4 > 8u) {
      s += slab_dot(k2, q2);
      dp += slab_dot(value_slab(place, 8u), g2);
    }
    if (HEAD_VEC4 > 12u) {
      s += slab_dot(k3, q3);
      dp += slab_dot(value_slab(place, 12u), g3);
    }

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
    let ds = mat4x4f(slope(s[0], dp[0], stat0, seen0), slope(s[1], dp[1], stat1, seen1),
      slope(s[2], dp[2], stat2, seen2), slope(s[3], dp[3], stat3, seen3));
    x0 = slab_add(x0, k0, ds);
    if (HEAD_VEC4 > 4u) { x1 = slab_add(x1, k1, ds); }
    if (HEAD_VEC4 > 8u) { x2 = slab_add(x2, k2, ds); }
    if (HEAD_VEC4 > 12u) { x3 = slab_add(x3, k3, ds); }
  }

  let f = vec4f(params.scale);
  store_slab(at, live, 0u, slab_scale(x0, f));
  if (HEAD_VEC4 > 4u) { store_slab(at, live, 4u, slab_scale(x1, f)); }
  if (HEAD_VEC4 > 8u) { store_slab(at, live, 8u, slab_scale(x2, f)); }
  if (HEAD_VEC4 > 12u) { store_slab(at, live, 12u, slab_scale(x3, f)); }
}

@if(subgroups)
@compute @workgroup_size(WG)
fn attention_dq(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, subgroup_lane % 4u);
}
@else
@compute @workgroup_size(WG)
fn attention_dq(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u, @builtin(local_invocation_index) lane: u32,
) {
  attend(workgroup_index(wid, nwg), lane, 0u);
}
