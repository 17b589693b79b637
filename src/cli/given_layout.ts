import { type Layout, parseLayout } from "../parallel/layout.ts";
import { UsageError } from "../tensor/errors.ts";

/**
 * A layout of the command line, which says something.
 * @param world number of ranks that it must have
 * @throws UsageError as `parseLayout`, and for an empty text
 */
export function givenLayout(text: string, world?: number): Layout {
  if (text.trim() !== "") return parseLayout(text, world);
  throw new UsageError("The layout must be key=value with commas between, such as tp=2,dp=2, found nothing.");
}
