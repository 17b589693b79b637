// Codes of matrices with scales beside them, for kernels that decode while they load. Values come in units
// along k that lie in whole words and share a scale, numbered through all rows of the matrix.
//
//   q8      signed bytes, value = code * scale; 32 to a unit
//   q4      value + 8 in four bits, value = (code - 8) * scale: the low halves of a word's bytes are the
//           first four, the high halves the next four; 32 to a unit
//   e2m1, e4m3, e5m2 (conditions): codes of lib/formats.wgsl, the first in the lowest bits; 16 to a unit
//
// Scales: halves for q8 and q4; with e8m0 a byte for 32 values, the exponent of a power of two; for e2m1
// otherwise an E4M3 byte for 16 values; else f32 for 128 values, or with `outer` none. `outer`: what is
// summed, or decoded, is multiplied at the end with an f32 of the row, the matrix or the tensor.
//
// `raw` leaves every code where it lies in its byte, so that two instructions make it a float; STEP takes the
// place of the byte out again, exactly. A sum over a block needs STEP once per x and OFFSET once per sum. The
// top byte of q8 is a signed number as it stands; the others are shifted into 0 .. 255 first.

const STEP = vec4f(1.0, 0.00390625, 0.0000152587890625, 0.000000059604644775390625); // 256^-i
@if(q4) const MASK = vec4u(0xfu, 0xf00u, 0xf0000u, 0xf000000u);
@else const MASK = vec4u(0xffu, 0xff00u, 0xff0000u, 0xff000000u);
@if(q4) const OFFSET = vec4f(8.0);
@else const OFFSET = vec4f(128.0, 128.0, 128.0, 0.0);

// Values and words of one unit.
@if(e2m1 || e4m3 || e5m2) const UNIT: u32 = 16;
@else const UNIT: u32 = 32;
@if(e2m1) const WORDS: u32 = 2;
@elif(q4 || e4m3 || e5m2) const WORDS: u32 = 4;
@else const WORDS: u32 = 8;

// Four neighbours: of a word of q8, or of the low halves of a word of q4.
fn raw(word: u32) -> vec4f {
  @if(q4) return vec4f(vec4i(vec4u(word) & MASK));
  @else return vec4f(vec4i(vec4u(word ^ 0x808080u) & MASK));
}

// Four values without their scale: of a word of E4M3 or E5M2, or of the low half of a word of E2M1.
//
// `f` has the code's fraction and the right exponent but for codes whose exponent is zero; these have no
// leading one, and 2 f - 2^emin, which is smaller only for them, is their value. Exact, without subnormals.
fn small_values(word: u32) -> vec4f {
  @if(e2m1) return e2m1_values(word);
  @elif(e5m2) return e5m2_values(word);
  @else return e4m3_values(word);
}

fn e2m1_values(word: u32) -> vec4f {
  let t = vec4u(word) << vec4u(28u, 24u, 20u, 16u);
  let f = bitcast<vec4f>(((t & vec4u(0x70000000u)) >> vec4u(6u)) + vec4u(0x3f000000u));
  return signed(min(f, 2.0 * f - 1.0), t);
}

fn e5m2_values(word: u32) -> vec4f {
  let t = vec4u(word) << vec4u(24u, 16u, 8u, 0u);
  let f = bitcast<vec4f>(((t & vec4u(0x7f000000u)) >> vec4u(3u)) + vec4u(0x38000000u));
  return signed(min(f, 2.0 * f - 0x1p-14), t);
}

fn e4m3_values(word: u32) -> vec4f {
  let t = vec4u(word) << vec4u(24u, 16u, 8u, 0u);
  let f = bitcast<vec4f>(((t & vec4u(0x7f000000u)) >> vec4u(4u)) + vec4u(0x3c000000u));
  return signed(min(f, 2.0 * f - 0x1p-6), t);
}

fn signed(magnitude: vec4f, t: vec4u) -> vec4f {
  return bitcast<vec4f>(bitcast<vec4u>(magnitude) | (t & vec4u(0x80000000u)));
}

// Four values of number `step` of a unit's words and halves of words, times the unit's scale.
fn scaled_values(word: u32, scale: f32) -> vec4f {
  @if(e2m1 || e4m3 || e5m2) return small_values(word) * scale;
  @else return fma(raw(word), STEP * scale, OFFSET * -scale);
}

// Which word of the scales holds that of unit `at`.
fn scale_index(at: u32) -> u32 {
  @if(e8m0) return at / 8u;
  @elif(e2m1) return at / 4u;
  @elif(outer) return 0u;
  @elif(e4m3 || e5m2) return at / 8u;
  @else return at / 2u;
}

// The scale of unit `at` out of that word.
fn scale_value(word: u32, at: u32) -> f32 {
  // A power of two below the normal numbers counts as zero.
  @if(e8m0) return bitcast<f32>(((word >> (at / 2u % 4u * 8u)) & 0xffu) << 23u);
  @elif(e2m1) {
    let f = bitcast<f32>((((word >> (at % 4u * 8u)) & 0x7fu) << 20u) + 0x3c000000u);
    return min(f, 2.0 * f - 0x1p-6);
  }
  @elif(outer) return 1.0;
  @elif(e4m3 || e5m2) return bitcast<f32>(word);
  @else {
    let both = unpack2x16float(word);
    return select(both.x, both.y, (at & 1u) == 1u);
  }
}
