/**
 * Quantisation-aware distillation: matrices learn to predict, after rounding, what the model predicted
 * before.
 *
 *   loss = KL(softmax(teacher) || softmax(student)), mean over the positions; the student computes with
 *   rounded weights, and the gradients of those move the weights that are rounded (straight through).
 *
 * AdamW without decay, gradients clipped to norm 1. What is not quantised stays as it is. Weights are rounded
 * as for `max`: the kernels of `quantize` on the device give the codes of encode.ts but for blocks of zeros
 * and for those below the smallest block scale.
 */
import { Tape } from "../autograd/tape.ts";
import type { GradientMap } from "../autograd/tape.ts";
import { listParameters, tensorsOf } from "../models/checkpoint_names.ts";
import { NemotronH } from "../models/nemotron_h.ts";
import { cast } from "../ops/cast.ts";
import { add, scale } from "../ops/elementwise.ts";
import { dequantize, quantize } from "../ops/quantize.ts";
import { softmax } from "../ops/softmax.ts";
import { BLOCK_LAYOUTS } from "../tensor/blocks.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import { scope, unscoped } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { together } from "../tensor/together.ts";
import { AdamW } from "../train/optimizer.ts";
import type { Batch } from "../train/packing.ts";
import { Divergence } from "./divergence.ts";
import { CODED, type TargetFormat } from "./encode.ts";

export interface DistillOptions {
  readonly steps: number;
  readonly lr: number;
}

export interface Distilled {
  /** Divergence from the teacher over some calibration rows, in nats: of rounded weights, and at the end. */
  readonly before: number;
  readonly after: number;
}

type Format = TargetFormat | "bf16";

/** What a format keeps of a weight, as f32. */
function rounded(weight: Tensor, format: Format): Tensor {
  if (format === "bf16") return cast(cast(weight, "bf16"), "f32");
  return dequantize(quantize(weight, CODED[format], format === "mxfp8" ? { scaleRule: "ceil" } : {}));
}

/**
 * Trains the weights of a model that will be rounded.
 * @param model f32 weights; what it holds afterwards is worthless
 * @param formats by checkpoint name of the weight
 * @param values by checkpoint name; those that were trained are replaced
 * @param onStep called after each step
 */
export async function distill(
  model: NemotronH, batches: readonly Batch[], formats: ReadonlyMap<string, Format>,
  values: Map<string, Float32Array>, { steps, lr }: DistillOptions,
  onStep: (done: number) => void = () => {},
): Promise<Distilled> {
  const { device } = model;
  // Experts of a layer that are not all rounded alike stay as they are, and so do rows that the device has
  // no blocks for.
  const learning = listParameters(model.config).flatMap((parameter) => {
    const found = new Set(tensorsOf(parameter).map(({ name }) => formats.get(name)));
    const [format] = found;
    const fits = format && (format === "bf16"
      || parameter.shape.at(-1)! % BLOCK_LAYOUTS[CODED[format]].block === 0);
    return found.size === 1 && format && fits ? [{ parameter, format }] : [];
  });
  const named = (tensors: readonly Tensor[]) =>
    new Map(learning.map(({ parameter }, i) => [parameter.name, tensors[i]!]));
  const shapes = learning.map(({ parameter }) => parameter.shape);
  const [masters, originals] = unscoped(
    () => [named(together(device, shapes)), named(together(device, shapes))]);
  const optimizer = unscoped(() => new AdamW(masters, {
    betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0, clip: 1,
  }));
  const teacher = new NemotronH(model.config, new Map([...model.parameters, ...originals]));
  const places: GradientMap = new Map();
  const round = () => scope(() => {
    for (const { parameter: { name }, format } of learning) {
      model.parameters.get(name)!.copyFrom(rounded(masters.get(name)!, format));
    }
  });
  try {
    for (const { parameter: { name } } of learning) {
      const student = model.parameters.get(name)!;
      for (const copy of [masters.get(name)!, originals.get(name)!]) copy.copyFrom(student);
      student.requiresGrad = true;
      places.set(student.key, optimizer.gradients.get(masters.get(name)!.key)!);
    }
    const divergence = await Divergence.of(teacher, batches.slice(0, 4));
    round();
    const before = await divergence.measure(model);
    for (let step = 0; step < steps; step++) {
      optimizer.prepare(step, lr);
      oneStep(model, teacher, batches[step % batches.length]!, places, optimizer, masters);
      round();
      await device.finish();
      onStep(step + 1);
    }
    const after = await divergence.measure(model);
    for (const { parameter } of learning) {
      const whole = await masters.get(parameter.name)!.read() as Float32Array;
      tensorsOf(parameter).forEach(({ name, shape }, i) =>
        values.set(name, whole.slice(i * sizeOf(shape), (i + 1) * sizeOf(shape))));
    }
    return { before, after };
  } finally {
    for (const { parameter: { name } } of learning) model.parameters.get(name)!.requiresGrad = false;
    optimizer.dispose();
    for (const tensor of [...masters.values(), ...originals.values()]) tensor.dispose();
  }
}

/** Gradients of the divergence on one batch, and an update. */
function oneStep(
  student: NemotronH, teacher: NemotronH, batch: Batch, places: GradientMap, optimizer: AdamW,
  masters: ReadonlyMap<string, Tensor>,
): void {
  const { device } = student;
  const [B, L] = [batch.batch, batch.seqlen];
  const tape = new Tape();
  try {
    scope(() => {
      const ids = device.tensor(batch.input_ids, [B, L]);
      const context = { seq_idx: device.tensor(batch.seq_idx, [B, L]), step: null, routing: null };
      const wanted = softmax(teacher.logits(teacher.hidden(ids, context)));
      const logits = tape.run(() => student.logits(student.hidden(ids, context)));
      const seed = scale(add(softmax(logits), scale(wanted, -1)), 1 / (B * L));
      const gradients = tape.backward([logits], [seed], places);
      try {
        const byMaster: GradientMap = new Map();
        for (const [name, master] of masters) {
          const gradient = gradients.get(student.parameters.get(name)!.key);
          if (gradient) byMaster.set(master.key, gradient);
        }
        optimizer.update(byMaster);
      } finally {
        for (const gradient of gradients.values()) gradient.release();
      }
    });
  } finally {
    tape.dispose();
  }
}
