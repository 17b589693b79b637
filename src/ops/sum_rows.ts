/** Sums over rows: bias gradients, and the parts of a product's long sum. Not ops themselves. */
import { launch } from "../kernel/launch.ts";
import type { Tensor } from "../tensor/tensor.ts";

const WG = 32;

/** out = sum of the rows of x [rows, cols], in a fixed order; out [cols]. */
export function sumRows(x: Tensor, rows: number, cols: number, out: Tensor): void {
  const length = 64;
  if (rows <= 2 * length) return sumParts(x, rows, cols, 1, rows, out, false);
  const parts = Math.ceil(rows / length);
  const partial = x.device.empty([parts, cols]);
  sumParts(x, rows, cols, parts, length, partial, false);
  sumParts(partial, parts, cols, 1, parts, out, false);
}

/** out [parts, cols] (+)= the sums of `length` rows of x [rows, cols] each, rows ascending. */
export function sumParts(
  x: Tensor, rows: number, cols: number, parts: number, length: number, out: Tensor, accumulate: boolean,
): void {
  const vec4 = cols % 4 === 0;
  const width = vec4 ? cols / 4 : cols;
  launch("matmul/sum_rows", {
    bind: { x, out }, params: { rows, cols: width, parts, length },
    conditions: [...(vec4 ? ["vec4" as const] : []), ...(accumulate ? ["accumulate" as const] : [])],
    workgroups: [Math.ceil((width * parts) / WG)],
  });
}
