// What becomes of four sums of a matrix product before they are stored; `extra` belongs to the same elements
// and is a matrix of Extra.
//
// relu2: max(sum, 0)^2. relu2_of: sum * 2 max(h, 0), where extra = max(h, 0)^2 is what relu2 stored; the
// square root gives max(h, 0) back, so that h itself need not be kept. residual: sum + extra.
@if(c_vec) alias Extra = vec4f;
@else alias Extra = f32;

fn finished(sum: vec4f, extra: vec4f) -> vec4f {
  var value = sum;
  @if(relu2) value = max(value, vec4f()) * max(value, vec4f());
  @if(relu2_of) value *= 2.0 * sqrt(extra);
  @if(residual) value += extra;
  return value;
}
