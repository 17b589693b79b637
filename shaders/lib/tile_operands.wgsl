// Four neighbours at a time from the factors of a tile kernel, and four of its sums to the result.
//
// The importing file declares the buffers a, b, c, bias and extra with element types by the conditions
// a_half, a_vec, b_half, b_vec, c_half and c_vec: a vector of four neighbours (vec4f, or vec2u of halves) or
// one element (f32, or a word of two halves).

import package::lib::epilogue::finished;
import package::lib::operand::a_pair;
import package::lib::operand::b_pair;
import package::lib::operand::c_pack;

// Four neighbours of op(A) from `base` on, `stride` apart, of which `count` exist; the others are zero.
fn load_a(base: u32, stride: u32, count: u32) -> vec4f {
  var x = vec4f();
  @if(a_vec && a_half) { if (count > 0u) { x = vec4f(a_pair(a[base / 4u].x), a_pair(a[base / 4u].y)); } }
  @elif(a_vec) { if (count > 0u) { x = a[base / 4u]; } }
  @else for (var i = 0u; i < min(count, 4u); i++) {
    let at = base + i * stride;
    @if(a_half) x[i] = select(a_pair(a[at / 2u]).x, a_pair(a[at / 2u]).y, at % 2u == 1u);
    @else x[i] = a[at];
  }
  return x;
}

// The same of op(B).
fn load_b(base: u32, stride: u32, count: u32) -> vec4f {
  var x = vec4f();
  @if(b_vec && b_half) { if (count > 0u) { x = vec4f(b_pair(b[base / 4u].x), b_pair(b[base / 4u].y)); } }
  @elif(b_vec) { if (count > 0u) { x = b[base / 4u]; } }
  @else for (var i = 0u; i < min(count, 4u); i++) {
    let at = base + i * stride;
    @if(b_half) x[i] = select(b_pair(b[at / 2u]).x, b_pair(b[at / 2u]).y, at % 2u == 1u);
    @else x[i] = b[at];
  }
  return x;
}

// The epilogue of four neighbours in a row, of which `count` exist.
fn store(sum: vec4f, at: u32, column: u32, count: u32) {
  var value = sum;
  @if(bias) for (var j = 0u; j < count; j++) { value[j] += bias[column + j]; }
  var more = vec4f();
  @if(relu2_of && c_vec || residual && c_vec) more = extra[at / 4u];
  @elif(relu2_of || residual) for (var j = 0u; j < count; j++) { more[j] = extra[at + j]; }
  value = finished(value, more);
  @if(c_half) c[at / 4u] = c_pack(value);
  @elif(c_vec) {
    @if(accumulate) value += c[at / 4u];
    c[at / 4u] = value;
  }
  @else for (var j = 0u; j < count; j++) {
    @if(accumulate) value[j] += c[at + j];
    c[at + j] = value[j];
  }
}
