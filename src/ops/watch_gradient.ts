import { nextKey, type Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";
import { relu2Gradients } from "./relu2_gradient.ts";

/** Sees gradients on their way back. */
export interface GradientWatcher {
  /** @param dy its memory is the op's; whoever keeps it retains it */
  sees(dy: Tensor): void;
}

/**
 * x as it is. On the way back the watcher sees the gradient of x, or where x is max(h, 0)^2 that of h, before
 * what made x gets it: of several ranks the gradients of all of them before the first goes on.
 */
export const watch_gradient = defineOp({
  name: "watch_gradient",
  halves: [0],
  relu2: [0],
  forward(ctx, x: Tensor, watcher: GradientWatcher): Tensor {
    const y = x.prefix(x.shape);
    const isSquare = x.relu2Key !== null;
    if (isSquare) y.relu2Key = nextKey();
    ctx.save({ squared: isSquare ? x : null, watcher });
    return y;
  },
  backward(
    { squared, watcher }: { squared: Tensor | null; watcher: GradientWatcher }, [dy, dsquare],
  ) {
    const dh = squared ? relu2Gradients(dy, dsquare, squared) : dy;
    if (dh) watcher.sees(dh);
    return [dh];
  },
});
