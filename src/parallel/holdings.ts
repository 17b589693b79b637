/** What the ranks of a pipeline hold of a model: the parameters of their stages, cut as shards.ts says. */
import type { NemotronHConfig } from "../models/config.ts";
import { parametersOf } from "../models/part.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Layout } from "./layout.ts";
import { placeOfStage, stagesOf } from "./stages.ts";
import { shardOf } from "./shards.ts";

/** Parameters of one rank, counted. */
export interface Holdings {
  /** What is trained and lies on the attention grid: the same on the ranks of dp-cp. */
  readonly dense: number;
  /** What is trained of routed experts: the same on the ranks of edp. */
  readonly experts: number;
  /** What load balancing moves, not the loss: the routers' biases. */
  readonly untrained: number;
  /** Of `dense`: what all ranks of tp hold whole, since it acts on single positions. */
  readonly whole: number;
  /** Of `dense`: keys and values that ranks of tp share, since there are fewer key heads than ranks. */
  readonly shared: number;
  /** Of `dense`: the embedding table that a prediction block needs in another stage than the first. */
  readonly copied: number;
}

/** The holdings of the ranks of each pipeline rank: all ranks of a stage hold as much. */
export function holdingsOf(layout: Layout, config: NemotronHConfig): Holdings[] {
  const found = Array.from({ length: layout.pp }, () =>
    ({ dense: 0, experts: 0, untrained: 0, whole: 0, shared: 0, copied: 0 }));
  stagesOf(layout, config).forEach((stage, i) => {
    const rank = found[placeOfStage(layout, i).rank]!;
    for (const parameter of parametersOf(config, stage)) {
      const shard = shardOf(parameter, config, layout);
      const size = sizeOf(shard.shape);
      if (!parameter.trainable) rank.untrained += size;
      else if (shard.expert) rank.experts += size;
      else {
        rank.dense += size;
        if (shard.copies > 1) rank[shard.cuts.length > 0 ? "shared" : "whole"] += size;
        if (parameter.kind === "embedding" && !stage.embedding) rank.copied += size;
      }
    }
  });
  return found;
}
