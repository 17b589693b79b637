/** Parts of a model, as the stages of a pipeline hold them. */
import { listParameters, type Parameter } from "./checkpoint_names.ts";
import type { NemotronHConfig } from "./config.ts";

/** Consecutive layers of a model, and what it has besides. */
export interface Part {
  /** Layers of the chain: from this one on, up to `to` and without it. */
  readonly from: number;
  readonly to: number;
  /** The embedding of the tokens, where a run begins. */
  readonly embedding: boolean;
  /** The head, and with it the cross entropy. */
  readonly head: boolean;
  /** The prediction layers, for which it holds an embedding table too. */
  readonly mtp: boolean;
}

/** All of a model. */
export function wholePart(config: NemotronHConfig): Part {
  const to = config.hybrid_override_pattern.length;
  return { from: 0, to, embedding: true, head: true, mtp: config.num_nextn_predict_layers > 0 };
}

/** Whether a part ends the chain: then the final norm belongs to it. */
export function endsChain({ from, to }: Part, config: NemotronHConfig): boolean {
  return from < to && to === config.hybrid_override_pattern.length;
}

/** The parameters that a part of a model holds, in the order of the forward pass. */
export function parametersOf(config: NemotronHConfig, part: Part): Parameter[] {
  return listParameters(config).filter((parameter) => {
    if (parameter.part === "mtp") return part.mtp;
    if (parameter.layer !== null) return parameter.layer >= part.from && parameter.layer < part.to;
    switch (parameter.kind) {
      case "embedding": return part.embedding || part.mtp;
      case "head": return part.head;
      default: return endsChain(part, config);
    }
  });
}
