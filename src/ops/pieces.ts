/** Pieces of some tensors that are put into others: what collectives and `take_ranges` have in common. */
import { launch } from "../kernel/launch.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";

const WG = 64;
/** Inputs and outputs of a launch: eight buffers are what every adapter can bind. */
export const MOST = 4;

/** Inputs of a launch, the first of them in the places of those that there are not. */
export function inputsOf(xs: readonly Tensor[]): Record<"x0" | "x1" | "x2" | "x3", Tensor> {
  const at = (i: number) => xs[i] ?? xs[0]!;
  return { x0: at(0), x1: at(1), x2: at(2), x3: at(3) };
}

/** Outputs of a launch; those that there are not have memory of their own, too, which nobody writes. */
export function outputsOf(ys: readonly Tensor[]): Record<"y0" | "y1" | "y2" | "y3", Tensor> {
  const { device, dtype } = ys[0]!;
  const at = (j: number) => ys[j] ?? device.empty([0], dtype);
  return { y0: at(0), y1: at(1), y2: at(2), y3: at(3) };
}

/** Invocations that share a row of so many elements. */
export function partsOf(width: number, { info }: Device): number {
  return Math.max(1, Math.ceil(width / (info.isSoftware ? 16 : 2)));
}

/** Where the pieces lie in a tensor: the first, and from one to the next, from block to block, row to row. */
interface Strides {
  readonly first?: number;
  readonly step: number;
  readonly block?: number;
  readonly row: number;
}

/**
 * Puts pieces of xs, blocks of `inner` rows of `width` elements, into ys. Piece j of input i goes to output j
 * as its piece i; where they are paired, input i has one for output i alone, its piece i. All on one device.
 */
export function movePieces(
  xs: readonly Tensor[], ys: readonly Tensor[],
  { blocks = 1, inner, width }: { blocks?: number; inner: number; width: number },
  source: Strides, goal: Strides, paired = false,
): void {
  const strides = [source, goal].flatMap(({ first = 0, step, block = 0, row }) =>
    [first, step, block, row]);
  const isWide = [width, ...strides].every((n) => n % 4 === 0);
  const unit = isWide ? 4 : 1;
  const parts = partsOf(width / unit, ys[0]!.device);
  const total = blocks * inner;
  for (let i = 0; i < xs.length; i += MOST) {
    for (let j = paired ? i : 0; j < (paired ? i + 1 : ys.length); j += MOST) {
      const [inputs, outputs] = [xs.slice(i, i + MOST), ys.slice(j, j + MOST)];
      launch("comm/pieces", {
        bind: { ...inputsOf(inputs), ...outputsOf(outputs) },
        params: {
          inputs: inputs.length, outputs: outputs.length, first_input: i, first_output: j,
          paired: paired ? 1 : 0, total, inner, width: width / unit, parts,
          source_first: (source.first ?? 0) / unit, source_step: source.step / unit,
          source_block: (source.block ?? 0) / unit, source_row: source.row / unit,
          goal_first: (goal.first ?? 0) / unit, goal_step: goal.step / unit,
          goal_block: (goal.block ?? 0) / unit, goal_row: goal.row / unit,
        },
        constants: { WG }, conditions: isWide ? ["vec4"] : [],
        workgroups: [width === 0 ? 0 : Math.ceil((inputs.length * total * parts) / WG)],
      });
    }
  }
}
