// Activation functions in f32, safe for any finite argument: exp is taken of values <= 0 only.

fn sigmoid(x: f32) -> f32 {
  let e = exp(-abs(x));
  return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

// silu(x) = x * sigmoid(x)
fn silu(x: f32) -> f32 {
  return x * sigmoid(x);
}

// d silu / dx = s * (1 + x * (1 - s)), s = sigmoid(x)
fn silu_grad(x: f32) -> f32 {
  let s = sigmoid(x);
  return s * (1.0 + x * (1.0 - s));
}

fn sigmoid4(x: vec4f) -> vec4f {
  let e = exp(-abs(x));
  return select(e, vec4f(1.0), x >= vec4f(0.0)) / (1.0 + e);
}

fn silu4(x: vec4f) -> vec4f {
  return x * sigmoid4(x);
}

fn silu_grad4(x: vec4f) -> vec4f {
  let s = sigmoid4(x);
  return s * (1.0 + x * (1.0 - s));
}

// log(1 + e) for 0 <= e <= 1, to a few ulp of the result.
//
// log(1.0 + e) would drop the low bits of a small e (all of them below 2^-24), and WGSL's log may be off by
// 2^-21 near 1. So the series log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3 is summed instead; the
// first term left out is s^17 / 17 < 2^-30.
fn log1p_unit(e: f32) -> f32 {
  let s = e / (2.0 + e);
  let q = s * s;
  var tail = 1.0 / 15.0;
  tail = 1.0 / 13.0 + q * tail;
  tail = 1.0 / 11.0 + q * tail;
  tail = 1.0 / 9.0 + q * tail;
  tail = 1.0 / 7.0 + q * tail;
  tail = 0.2 + q * tail;
  tail = 1.0 / 3.0 + q * tail;
  return 2.0 * (s + s * q * tail);
}

// softplus(x) = log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)); d softplus / dx = sigmoid(x). Freshly
// initialised steps have x near -7, where the result is as small as 1e-3 and its relative accuracy matters.
fn softplus(x: f32) -> f32 {
  return max(x, 0.0) + log1p_unit(exp(-abs(x)));
}
