/** The roundings of a trained model: which of its projections run in which formats, and when that changes. */
import { layerSpecs } from "../models/config.ts";
import { listParameters, type Parameter } from "../models/checkpoint_names.ts";
import type { NemotronHConfig } from "../models/config.ts";
import type { MeshModel } from "../parallel/model.ts";
import { planProducts, type PrecisionChoice, type Projection, recipeOf } from "../precision/plan.ts";
import { onOneRank, Precision, type RoundedProjection } from "../precision/precision.ts";
import { type Products, type Recipe, RECIPES } from "../precision/recipes.ts";
import { checkBlocks, RankRoundings, type RowSizes } from "./rank_rounding.ts";

const FAMILIES: Readonly<Partial<Record<Parameter["kind"], string>>> = {
  mamba_linear: "mamba", attention_linear: "attention", mlp_linear: "mlp", shared_linear: "shared",
  expert: "expert", latent_linear: "latent", mtp_linear: "mtp",
};

/** The matrices of a model's linear layers, in the order of its parameters. */
export function listProjections(config: NemotronHConfig): Projection[] {
  return listParameters(config).flatMap(({ name, kind, part, layer }) => {
    const family = FAMILIES[kind];
    if (!family || layer === null) return [];
    const role = `${family}.${name.replace(/\.weight$/, "").split(".").at(-1)!}`;
    return [{ name, role, part, layer }];
  });
}

/** Formats by parameter name. @param late whether the recipe has gone over to bf16 */
export function formatsOf(choice: PrecisionChoice, config: NemotronHConfig, late: boolean) {
  const recipe: Recipe = late ? RECIPES.bf16 : recipeOf(choice);
  return planProducts(recipe, listProjections(config), layerSpecs(config).length);
}

export interface RoundingOptions extends RowSizes {
  /** Updates of the whole run. */
  readonly steps: number;
  readonly seed: number;
  /** Micro-batches whose passes are recorded together. */
  readonly slots: number;
}

export class TrainingPrecision {
  readonly #mesh: MeshModel;
  readonly #choice: PrecisionChoice;
  readonly #options: RoundingOptions;
  readonly #ranks: RankRoundings | null;
  /** The update from which on everything is bf16. */
  readonly #switchAt: number;
  #current: { readonly late: boolean; readonly precision: Precision | null } | null = null;

  /** @throws UsageError where the layout cuts blocks of the formats */
  constructor(mesh: MeshModel, choice: PrecisionChoice, options: RoundingOptions) {
    this.#mesh = mesh;
    this.#choice = choice;
    this.#options = options;
    const { late_switch } = recipeOf(choice);
    this.#switchAt = late_switch < 1 ? Math.round(late_switch * options.steps) : Infinity;
    const plan = formatsOf(choice, mesh.config, false);
    checkBlocks(plan, (name) => mesh.parameters.get(name)!.shard, mesh.layout, options);
    this.#ranks = mesh.world > 1 ? new RankRoundings(mesh, options) : null;
  }

  /** The roundings of update number `update`; null: none. */
  at(update: number): Precision | null {
    const late = update >= this.#switchAt;
    if (this.#current?.late !== late) {
      this.#current?.precision?.dispose();
      this.#current = { late, precision: this.#make(late) };
    }
    return this.#current.precision;
  }

  dispose(): void {
    this.#current?.precision?.dispose();
    this.#ranks?.dispose();
    this.#current = null;
  }

  #make(late: boolean): Precision | null {
    const { config, parameters, stages } = this.#mesh;
    const plan = formatsOf(this.#choice, config, late);
    if (plan.size === 0) return null;
    const { seed, slots } = this.#options;
    const held = stages.map((): RoundedProjection[] => []);
    let entry = 0;
    [...plan].forEach(([name, products], number) => {
      const { parameter: { shape }, held: [found] } = parameters.get(name)!;
      if (found) held[found.stage]!.push(this.#on(name, found.tensor, products, number, entry));
      entry += (shape.length > 2 ? shape[0]! : 1) + 2;
    });
    const history = late ? null : recipeOf(this.#choice).amax_history;
    return new Precision(held, { seed, history, slots });
  }

  #on(
    name: string, weight: RoundedProjection["weight"], products: Products, number: number, entry: number,
  ): RoundedProjection {
    const ranks = this.#ranks;
    if (!ranks) return onOneRank(weight, products, number, entry);
    const { shape } = this.#mesh.parameters.get(name)!.parameter;
    const places = ranks.placesOf(name, weight, products);
    return {
      weight, products, number, tensor: ranks.tensorOf(name), matrix: ranks.matrixOf(name),
      divided: ranks.isDivided(name), ranks: places,
      scales: {
        weights: places.map((_, rank) => entry + ranks.firstMatrix(name, rank)),
        input: entry + (shape.length > 2 ? shape[0]! : 1),
      },
    };
  }
}
