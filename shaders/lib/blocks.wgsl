// Codes of block-quantised matrices. A value is (raw * STEP - OFFSET) * scale, with one scale for 32 values
// along k.
//
//   q8  signed bytes: four values per word
//   q4  value + 8 in four bits, eight values per word: the low halves of the bytes are the first four, the
//       high halves the next four
//
// `raw` leaves every code where it lies in its byte, so that two instructions make it a float; STEP takes the
// place of the byte out again, exactly. A sum over a block needs STEP once per x and OFFSET once per sum. The
// top byte of q8 is a signed number as it stands; the others are shifted into 0 .. 255 first.

const STEP = vec4f(1.0, 0.00390625, 0.0000152587890625, 0.000000059604644775390625); // 256^-i
@if(q4) const MASK = vec4u(0xfu, 0xf00u, 0xf0000u, 0xf000000u);
@else const MASK = vec4u(0xffu, 0xff00u, 0xff0000u, 0xff000000u);
@if(q4) const OFFSET = vec4f(8.0);
@else const OFFSET = vec4f(128.0, 128.0, 128.0, 0.0);
// Words of one block of 32 values.
@if(q4) const WORDS: u32 = 4;
@else const WORDS: u32 = 8;

// Four neighbours: of a word of q8, or of the low halves of a word of q4.
fn raw(word: u32) -> vec4f {
  @if(q4) return vec4f(vec4i(vec4u(word) & MASK));
  @else return vec4f(vec4i(vec4u(word ^ 0x808080u) & MASK));
}

// The scale number i among packed halves.
fn half_at(pair: u32, i: u32) -> f32 {
  let both = unpack2x16float(pair);
  return select(both.x, both.y, (i & 1u) == 1u);
}
