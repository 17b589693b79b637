// AdamW with decoupled weight decay, in place:
//   g = grad * grad_scale;  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
//   param -= lr * weight_decay * param where the slab decays, then
//   param -= lr * (m / correction1) / (sqrt(v / correction2) + eps)
//
//   param, grad, m, v: of one size, many parameters side by side, in elements of four.
//   slabs [count, 3]: first element, end, and 1 where the parameter decays; one workgroup per slab.
//   hyper [8]: lr, beta1, beta2, eps, weight_decay, correction1 = 1 - beta1^t, correction2 = 1 - beta2^t,
//   t - 1
//   grad_scale [1], negative: nothing changes.
//   Both are tensors so that a captured training step can be replayed with new values.
//
// Arithmetic is f32; conditions say what is stored:
//   m_bf16   m and v are bf16
//   bytes    m and v are codes of 8 bits, then one f32 scale for 64 of them (`params.scales` is its place):
//            m = s * q * |q| / 127^2, v = (s * q^2 / 255^2)^2; squares keep small values apart. A scale is
//            the largest |m| or sqrt(v) of its block. LANES invocations share a block. v > 0 has q >= 1,
//            since m over a v that has vanished would be a leap.
//   p_bf16   param is bf16, without masters
//   masters  param is bf16, with the low halves of f32 masters in `low`: param is the upper half, rounded by
//            the top bit of the lower one, which tells whether it was rounded up
// Moments, and bf16 parameters without masters, are rounded at random, so that many small steps add up to
// what they should: each of the two neighbours by its nearness. The random bits are those of Philox with
// counter (element of four, 0, t - 1, stream): 16 for the parameter, 8 for m and 8 for v.
//
// Source: Loshchilov and Hutter (arXiv 1711.05101); blocks of 8 bits: Dettmers et al. (arXiv 2110.02861).
import package::lib::index::workgroup_index;
@if(m_bf16 || bytes || p_bf16) import package::lib::philox::philox4x32;
@if(m_bf16 || p_bf16) import package::lib::half::bf16_pair;
@if(m_bf16 || p_bf16) import package::lib::formats::{random_code, BF16};

override WG: u32 = 64;
override LANES: u32 = 1;

struct Params {
  count: u32, // slabs
  seed_low: u32, seed_high: u32, stream: u32,
  scales: u32, // where scales begin, in words
}

@if(p_bf16 || masters) alias P = vec2u;
@else alias P = vec4f;
@if(bytes) alias M = u32;
@elif(m_bf16) alias M = vec2u;
@else alias M = vec4f;

@group(0) @binding(0) var<storage, read_write> param: array<P>;
@group(0) @binding(1) var<storage, read> grad: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> m: array<M>;
@group(0) @binding(3) var<storage, read_write> v: array<M>;
@group(0) @binding(4) var<storage, read> hyper: array<f32, 8>;
@group(0) @binding(5) var<storage, read> grad_scale: array<f32, 1>;
@group(0) @binding(6) var<storage, read> slabs: array<u32>;
@group(0) @binding(7) var<storage, read_write> low: array<vec2u>;
@group(1) @binding(0) var<uniform> params: Params;

@if(m_bf16 || bytes || p_bf16) fn random_words(i: u32) -> vec4u {
  return philox4x32(vec4u(i, 0u, u32(hyper[7]), params.stream), vec2u(params.seed_low, params.seed_high));
}

// Codes of bf16 around x, from 16 random bits.
@if(m_bf16 || p_bf16) fn bf16_random(x: vec4f, random: vec4u) -> vec2u {
  let bits = bitcast<vec4u>(x);
  let codes = vec4u(random_code(bits.x, random.x, BF16), random_code(bits.y, random.y, BF16),
    random_code(bits.z, random.z, BF16), random_code(bits.w, random.w, BF16));
  return codes.xz | (codes.yw << vec2u(16u));
}
@if(m_bf16 || p_bf16) fn bf16_quad(words: vec2u) -> vec4f {
  return vec4f(bf16_pair(words.x), bf16_pair(words.y));
}

@if(masters) fn halves(words: vec2u) -> vec4u {
  return vec4u(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
}

fn load_param(i: u32) -> vec4f {
  @if(masters) {
    let lower = halves(low[i]);
    return bitcast<vec4f>(((halves(param[i]) - (lower >> vec4u(15u))) << vec4u(16u)) | lower);
  }
  @elif(p_bf16) return bf16_quad(param[i]);
  @else return param[i];
}

fn store_param(i: u32, x: vec4f) {
  @if(masters) {
    let bits = bitcast<vec4u>(x);
    let lower = bits & vec4u(0xffffu);
    let upper = (bits >> vec4u(16u)) + (lower >> vec4u(15u));
    low[i] = lower.xz | (lower.yw << vec2u(16u));
    param[i] = upper.xz | (upper.yw << vec2u(16u));
  }
  @elif(p_bf16) param[i] = bf16_random(x, random_words(i) & vec4u(0xffffu));
  @else param[i] = x;
}

struct Moments { m: vec4f, v: vec4f }

@if(bytes) const MOST = vec2f(16129.0, 65025.0); // 127^2, 255^2

// `unit`: scales over MOST.
fn load_moments(i: u32, unit: vec2f) -> Moments {
  @if(bytes) {
    let signed = vec4f(bitcast<vec4i>(vec4u(m[i]) << vec4u(24u, 16u, 8u, 0u)) >> vec4u(24u));
    let root = vec4f((vec4u(v[i]) >> vec4u(0u, 8u, 16u, 24u)) & vec4u(255u));
    let u = root * root * unit.y;
    return Moments(signed * abs(signed) * unit.x, u * u);
  }
  @elif(m_bf16) return Moments(bf16_quad(m[i]), bf16_quad(v[i]));
  @else return Moments(m[i], v[i]);
}

@if(bytes) fn packed(codes: vec4u) -> u32 {
  let bytes = (codes & vec4u(255u)) << vec4u(0u, 8u, 16u, 24u);
  return bytes.x | bytes.y | bytes.z | bytes.w;
}

// Of two neighbours the upper one, with the probability that `past`, of its share of the way, says.
@if(bytes) fn upper(below: vec4f, past: vec4f, random: vec4u) -> vec4f {
  return below + select(vec4f(0.0), vec4f(1.0), past * 256.0 > vec4f(random & vec4u(255u)) + 0.5);
}

// `unit`: MOST over scales.
fn store_moments(i: u32, x: Moments, unit: vec2f) {
  @if(m_bf16 || bytes) let words = random_words(i);
  @if(bytes) {
    // m goes with the square of its code, v with the fourth power.
    let square = abs(x.m) * unit.x;
    let a = floor(sqrt(square));
    let code = min(upper(a, (square - a * a) / (2.0 * a + 1.0), words >> vec4u(16u)), vec4f(127.0));
    m[i] = packed(bitcast<vec4u>(vec4i(code * sign(x.m))));
    let root = sqrt(x.v) * unit.y;
    let b = floor(sqrt(root));
    let c = b + 1.0;
    let past = (root * root - b * b * b * b) / (c * c * c * c - b * b * b * b);
    let least = select(vec4f(0.0), vec4f(1.0), root > vec4f(0.0));
    v[i] = packed(vec4u(clamp(upper(b, past, words >> vec4u(24u)), least, vec4f(255.0))));
  }
  @elif(m_bf16) {
    m[i] = bf16_random(x.m, ((words >> vec4u(8u)) & vec4u(0xff00u)) | vec4u(128u));
    v[i] = bf16_random(x.v, ((words >> vec4u(16u)) & vec4u(0xff00u)) | vec4u(128u));
  }
  @else {
    m[i] = x.m;
    v[i] = x.v;
  }
}

fn advanced(i: u32, unit: vec2f) -> Moments {
  let old = load_moments(i, unit);
  let g = grad[i] * grad_scale[0];
  let beta1 = hyper[1];
  let beta2 = hyper[2];
  return Moments(beta1 * old.m + (1.0 - beta1) * g, beta2 * old.v + (1.0 - beta2) * g * g);
}

fn step(i: u32, x: Moments, shrink: f32) {
  let p = load_param(i);
  store_param(i, p - shrink * p - hyper[0] * (x.m / hyper[5]) / (sqrt(x.v / hyper[6]) + hyper[3]));
}

@if(bytes) var<workgroup> peaks: array<vec2f, WG>;

@compute @workgroup_size(WG)
fn adamw(
  @builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) nwg: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let slab = workgroup_index(wid, nwg);
  if (slab >= params.count || grad_scale[0] < 0.0) {
    return;
  }
  let first = slabs[3u * slab];
  let end = min(slabs[3u * slab + 1u], arrayLength(&param));
  let shrink = select(0.0, hyper[0] * hyper[4], slabs[3u * slab + 2u] != 0u);
  @if(!bytes) for (var i = first + lane; i < end; i += WG) {
    let x = advanced(i, vec2f());
    step(i, x, shrink);
    store_moments(i, x, vec2f());
  }
  @if(bytes) for (var at = first; end > at; at += 16u * (WG / LANES)) {
    let start = at + lane / LANES * 16u;
    let stop = min(start + 16u, end);
    let place = params.scales + start / 16u;
    var unit = vec2f();
    if (end > start) { unit = bitcast<vec2f>(vec2u(m[place], v[place])) / MOST; }
    var peak = vec2f();
    for (var i = start + lane % LANES; i < stop; i += LANES) {
      let x = advanced(i, unit);
      step(i, x, shrink);
      let size = max(max(abs(x.m).xy, abs(x.m).zw), vec2f());
      let root = sqrt(max(max(x.v.xy, x.v.zw), vec2f()));
      peak = max(peak, vec2f(max(size.x, size.y), max(root.x, root.y)));
    }
    if (LANES > 1u) {
      workgroupBarrier();
      peaks[lane] = peak;
      workgroupBarrier();
      for (var n = 0u; n < LANES; n++) { peak = max(peak, peaks[lane / LANES * LANES + n]); }
    }
    // Below that a reciprocal could overflow.
    peak = max(peak, vec2f(1e-30));
    for (var i = start + lane % LANES; i < stop; i += LANES) {
      store_moments(i, advanced(i, unit), MOST / peak);
    }
    if (lane % LANES == 0u && end > start) {
      m[place] = bitcast<u32>(peak.x);
      v[place] = bitcast<u32>(peak.y);
    }
  }
}
