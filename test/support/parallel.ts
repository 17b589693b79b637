/** Models whose ranks share one device, and their gradients put together again. */
import type { NemotronHConfig } from "../../src/models/config.ts";
import { NemotronH, type Share } from "../../src/models/nemotron_h.ts";
import { parametersOf, wholePart } from "../../src/models/part.ts";
import type { Layout } from "../../src/parallel/layout.ts";
import { coordinatesOf, ranksPerStage } from "../../src/parallel/mesh.ts";
import { divisionOf } from "../../src/parallel/model.ts";
import { shardOf } from "../../src/parallel/shards.ts";
import type { Device } from "../../src/tensor/device.ts";
import { unscoped } from "../../src/tensor/scope.ts";
import { localsOf, shardedOf } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";

/** One value per rank; the ranks' tensors belong to it. */
export function onRanks(make: (rank: number) => Tensor, ranks: number): Tensor {
  return unscoped(() => {
    const locals = Array.from({ length: ranks }, (_, rank) => make(rank));
    const value = shardedOf(locals);
    if (ranks > 1) for (const local of locals) local.release();
    return value;
  });
}

/**
 * A model, or a part of one, on the ranks of one pipeline stage; its parameters require gradients.
 * @param values of the whole parameters, by name
 */
export function shardedModel(
  device: Device, config: NemotronHConfig, layout: Layout, values: ReadonlyMap<string, Float32Array>,
  part: Share["part"] = wholePart(config),
): NemotronH {
  const parameters = parametersOf(config, part).map((parameter) => {
    const shard = shardOf(parameter, config, layout);
    const tensor = onRanks((rank) => device.tensor(
      shard.slice(values.get(parameter.name)!, coordinatesOf(layout, rank)), shard.shape),
    ranksPerStage(layout));
    tensor.requiresGrad = parameter.trainable;
    return [parameter.name, tensor] as const;
  });
  return new NemotronH(config, new Map(parameters), new Map(), { division: divisionOf(layout), part });
}

/**
 * The gradients of whole parameters. Those of a rank's tensors are summed over the ranks that hold the same
 * one and have seen other tokens or used it for other heads; what ranks of tp computed alike counts once.
 * @param gradients by the key of a rank's tensor
 */
export async function wholeGradients(
  model: NemotronH, layout: Layout, gradients: ReadonlyMap<number, Tensor>,
): Promise<Map<string, Float32Array>> {
  const whole = new Map<string, Float32Array>();
  for (const parameter of parametersOf(model.config, model.part)) {
    if (!parameter.trainable) continue;
    const shard = shardOf(parameter, model.config, layout);
    const isAlike = !layout.sp && (shard.expert || shard.replicas.includes("tp"));
    const pieces = new Array<Float32Array | null>(shard.ranks).fill(null);
    const locals = localsOf(model.parameters.get(parameter.name)!);
    for (const [rank, local] of locals.entries()) {
      const place = coordinatesOf(layout, rank);
      if (isAlike && place.tp > 0) continue;
      const gradient = (await gradients.get(local.key)!.read()) as Float32Array;
      const same = shard.expert || shard.replicas.includes("tp")
        ? [shard.expert ? shard.indexOf(place) : 0]
        : sharing(shard.copies, place.tp);
      for (const index of same) {
        const sum = pieces[index];
        pieces[index] = sum ? sum.map((value, i) => value + gradient[i]!) : gradient;
      }
    }
    whole.set(parameter.name, shard.join(pieces.map((piece) => piece ?? pieces[0]!)));
  }
  return whole;
}

/** The ranks of tp whose piece is that of `tp`. */
function sharing(copies: number, tp: number): number[] {
  const first = Math.floor(tp / copies) * copies;
  return Array.from({ length: copies }, (_, i) => first + i);
}

export function norm(values: ArrayLike<number>): number {
  return Math.hypot(...Array.from(values));
}

/** ||a - b|| */
export function differenceNorm(a: ArrayLike<number>, b: ArrayLike<number>): number {
  return norm(Array.from(b, (value, i) => a[i]! - value));
}
