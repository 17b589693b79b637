/** Prints the ids of the adapters found here, one a line: what `.ci/run` loops over. */
import { provider } from "#gpu";

for (const { info } of await provider.listAdapters()) console.log(info.id);
