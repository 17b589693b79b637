import { countParameters } from "../models/accounting.ts";
import { preset } from "../models/presets.ts";
import { byteTokenizer } from "../text/byte_tokenizer.ts";
import { splitDocuments } from "../train/data.ts";
import { ngramBaselines } from "../train/ngram.ts";
import { tokenizeDocuments } from "../train/packing.ts";
import { makeRecipe } from "../train/recipe.ts";
import type { DataEvent, TrainOptions } from "./protocol.ts";

/**
 * Everything about a run that needs no device: config, recipe, tokens, what counting models achieve on them.
 * @throws FormatError without enough text; UsageError for a recipe out of range; ConfigError for an unknown
 *   preset
 */
export function planRun({ documents, preset: name = "tiny", recipe: given = {} }: TrainOptions) {
  const config = preset(name);
  const tokenizer = byteTokenizer(config.vocab_size);
  const { steps, batch } = makeRecipe(given);
  const { eval_every = Math.max(10, Math.ceil(steps / 10)), eval_rows = 8 * batch } = given;
  const recipe = makeRecipe({ ...given, eval_every, eval_rows });
  const split = splitDocuments(documents, { seed: recipe.seed });
  const train = tokenizeDocuments(split.train, tokenizer);
  const validation = tokenizeDocuments(split.validation, tokenizer);
  const { unigram, bigram, trigram } = ngramBaselines(train, validation, config.vocab_size);
  const data: DataEvent = {
    kind: "data", parameters: countParameters(config).total, steps,
    train_bytes: train.bytes, validation_bytes: validation.bytes,
    baselines: { unigram: unigram.bitsPerByte, bigram: bigram.bitsPerByte, trigram: trigram.bitsPerByte },
  };
  return { data, config, recipe, train, validation };
}
