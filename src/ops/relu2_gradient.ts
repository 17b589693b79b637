import { launch } from "../kernel/launch.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { add } from "./elementwise.ts";
import { converted } from "./gemm.ts";

/**
 * The gradient of h in squared = max(h, 0)^2, from that of the result or of h itself (`Tensor.relu2Key`), or
 * both; null without either.
 */
export function relu2Gradients(
  dy: Tensor | null | undefined, dh: Tensor | null | undefined, squared: Tensor,
): Tensor | null {
  if (!dy) return dh ?? null;
  const through = relu2Gradient(dy, squared);
  return dh ? add(through, dh) : through;
}

function relu2Gradient(dy: Tensor, squared: Tensor): Tensor {
  const dh = dy.device.empty(dy.shape);
  const EACH = dy.device.info.isSoftware ? 16 : 4;
  launch("matmul/relu2_gradient", {
    bind: { dy, squared: converted(squared, "f32"), dh }, params: { count: dy.size }, constants: { EACH },
    workgroups: [Math.ceil(dy.size / (64 * EACH))],
  });
  return dh;
}
