// Operands of a matrix product: words of two halves, each f16 or (conditions a_bf16, b_bf16, c_bf16) bf16,
// and rows behind a table, for a file that declares table params.per and params.stored.

import package::lib::half::f16_pair;
import package::lib::half::bf16_pair;
import package::lib::half::f16_pack;
import package::lib::half::bf16_pack;

fn a_pair(bits: u32) -> vec2f {
  @if(a_bf16) return bf16_pair(bits);
  @else return f16_pair(bits);
}

fn b_pair(bits: u32) -> vec2f {
  @if(b_bf16) return bf16_pair(bits);
  @else return f16_pair(bits);
}

fn c_pack(x: vec4f) -> vec2u {
  @if(c_bf16) return vec2u(bf16_pack(x.xy), bf16_pack(x.zw));
  @else return vec2u(f16_pack(x.xy), f16_pack(x.zw));
}

// Where row r of A (row k of B) is stored; what the table holds never leads out of the rows that there are.
fn stored_row(r: u32) -> u32 {
  return min(table[r] / params.per, params.stored - 1u);
}
