/**
 * What the model of spec_model.ts computes, from an independent float64 program. Gradients are central
 * differences of the loss, accurate to about 1e-8.
 */

export const TOKENS = [15, 23, 0, 12, 0, 26, 16, 6, 10, 24, 30, 31, 13];

/**
 * After the embedding and after each layer: sum, sum of absolute values, and the first entries of the last
 * row.
 */
export const RESIDUALS: readonly (readonly [number, number, readonly number[]])[] = [
  [12.856976464, 98.537011378, [-0.302094284, 0.984095158, -0.534901849]],
  [18.879429899, 140.501059941, [-0.057950489, 1.715395646, -0.375381499]],
  [22.89199178, 176.453884537, [2.741491663, 2.122524951, -2.430754724]],
  [31.778210406, 182.604124964, [2.831153765, 2.583794791, -2.401710725]],
  [14.771150753, 199.191120494, [1.995373884, 3.221308837, -1.594521599]],
  [7.398730994, 219.98318287, [2.877823107, 2.198886636, -2.285038556]],
];

/**
 * The three experts of every token, best first, and the weights of two tokens in the order of their numbers.
 */
export const EXPERTS = "023 503 173 250 310 023 260 013 506 265 603 243".split(" ");
export const EXPERT_WEIGHTS = [
  [1.058253103, 0.824939169, 0.616807729], [0.766946104, 0.833132692, 0.899921204],
] as const;

export const LOGITS_FIRST = [0.576114793, -0.875612237, 0.734858831, -0.561512303];
export const LOGITS_LAST = [0.235983308, -0.450588487, 0.570173931, -0.34158776, -0.308211325, 1.004129412];
/** Sum and sum of absolute values. */
export const LOGITS_SUMS = [5.118856604, 212.473951438];
export const ARGMAX = [8, 5, 16, 26, 8, 13, 17, 14, 27, 8, 27, 23];
export const MTP_LOGITS: readonly (readonly [string, number, readonly number[]])[] = [
  ["mtp.logits", 0, [0.008766111, -0.092364061, 0.819715235, 0.190788843]],
  ["mtp.logits", 10, [0.507177752, -0.227890027, -0.56164245, 0.060838132]],
  ["mtp.logits_depth2", 0, [-0.741574758, -0.081827153, -0.809933134, -0.18165695]],
  ["mtp.logits_depth2", 9, [0.084322946, -0.375129182, -0.332189103, -0.016990163]],
];

/**
 * By layer: sum and sum of absolute values of the final state; sum of the last three inputs of the
 * convolution.
 */
export const STATES = [
  [0, -0.436388427, 3.939723783, 12.58018152], [4, 0.416236877, 3.361400463, -6.990254742],
] as const;

/** Next token, depth 1, depth 2, and the total with a weight of 0.3 on the mean of the depths. */
export const LOSSES = [3.685961341226, 3.711724506686, 3.523325242835, 4.771218803654];

export const PROMPT = [15, 23, 0, 12, 0];
export const CONTINUATION = [8, 1, 8, 26, 23, 8, 21, 0, 30, 8, 24, 17];

/**
 * Gradients of the total: sum, sum of absolute values, first entry. `@e` names one expert of a stacked
 * parameter.
 */
export const GRADIENTS: readonly (readonly [string, number, number, number])[] = [
  ["backbone.embeddings.weight", -0.75586426, 6.41066238, 0.06329152],
  ["backbone.layers.0.norm.weight", 0.06183664, 1.2521645, -0.15270529],
  ["backbone.layers.0.mixer.in_proj.weight", 0.88351432, 41.99925004, -0.03768091],
  ["backbone.layers.0.mixer.conv1d.weight", -0.52124389, 6.84063568, 0.08651289],
  ["backbone.layers.0.mixer.conv1d.bias", 0.17202403, 4.52810844, -0.20623558],
  ["backbone.layers.0.mixer.dt_bias", -0.00172325, 0.00501244, -0.00023605],
  ["backbone.layers.0.mixer.A_log", -0.00190648, 0.00593003, -0.00182278],
  ["backbone.layers.0.mixer.D", 0.00053066, 0.09036627, -0.01873677],
  ["backbone.layers.0.mixer.norm.weight", 0.22216774, 0.94031167, -0.04887532],
  ["backbone.layers.0.mixer.out_proj.weight", 2.77703042, 32.14119477, -0.20944706],
  ["backbone.layers.1.norm.weight", 0.06782964, 0.49311971, -0.05551712],
  ["backbone.layers.1.mixer.gate.weight", -0.03397083, 1.07922713, 0.00434646],
  ["backbone.layers.1.mixer.fc1_latent_proj.weight", 0.31648394, 7.03692125, -0.02890165],
  ["backbone.layers.1.mixer.fc2_latent_proj.weight", -0.54121532, 4.85980864, -0.01805602],
  ["backbone.layers.1.mixer.experts.up_proj@0", -0.00490915, 2.4331187, 0.06018542],
  ["backbone.layers.1.mixer.experts.down_proj@0", 1.22466253, 1.87576042, 0.02368758],
  ["backbone.layers.1.mixer.experts.up_proj@7", 0.00389359, 0.14562164, -0.00627069],
  ["backbone.layers.1.mixer.experts.down_proj@7", -0.02370097, 0.22951041, -0.00905941],
  ["backbone.layers.1.mixer.shared_experts.up_proj.weight", 0.57983672, 7.68587316, -0.00450782],
  ["backbone.layers.1.mixer.shared_experts.down_proj.weight", -0.59679918, 5.96233958, 0.00183939],
  ["backbone.layers.2.norm.weight", 0.02723327, 0.29608133, -0.01378345],
  ["backbone.layers.2.mixer.q_proj.weight", 0.02095155, 2.31828183, -0.0046174],
  ["backbone.layers.2.mixer.k_proj.weight", 0.12013769, 1.86527233, 0.00244908],
  ["backbone.layers.2.mixer.v_proj.weight", 0.06374358, 5.14743697, 0.02205576],
  ["backbone.layers.2.mixer.o_proj.weight", -0.05172495, 11.69296971, 0.02301946],
  ["backbone.layers.3.norm.weight", -0.19473718, 0.37422223, -0.01815848],
  ["backbone.layers.3.mixer.up_proj.weight", -0.48677576, 9.56661362, -0.00635657],
  ["backbone.layers.3.mixer.down_proj.weight", -0.74095918, 7.3583717, 0.00138116],
  ["backbone.layers.4.norm.weight", 0.05743831, 0.64384436, 0.02536473],
  ["backbone.layers.4.mixer.in_proj.weight", 0.44923199, 22.24436731, -0.00560225],
  ["backbone.layers.4.mixer.conv1d.weight", 0.03846082, 2.77899847, -0.06680934],
  ["backbone.layers.4.mixer.conv1d.bias", 0.32237769, 1.46890084, 0.01496003],
  ["backbone.layers.4.mixer.dt_bias", -0.00150153, 0.00150153, -0.0001931],
  ["backbone.layers.4.mixer.A_log", -0.00305072, 0.00321749, 8.338e-05],
  ["backbone.layers.4.mixer.D", 0.01548693, 0.11173485, -0.03061568],
  ["backbone.layers.4.mixer.norm.weight", -0.04884965, 0.47733879, -0.00743869],
  ["backbone.layers.4.mixer.out_proj.weight", -0.08345981, 14.27443309, 0.07346287],
  ["backbone.norm_f.weight", 0.42935203, 0.62867471, 0.06631626],
  ["lm_head.weight", 0.0, 16.53392005, -0.08125089],
  ["mtp.layers.0.enorm.weight", -0.02503788, 0.1628759, -0.00036747],
  ["mtp.layers.0.hnorm.weight", 0.0665846, 0.08148024, 0.01018133],
  ["mtp.layers.0.eh_proj.weight", 0.28349231, 7.12112118, 0.03068523],
  ["mtp.layers.0.norm.weight", -0.01842283, 0.13188382, -0.00273618],
  ["mtp.layers.0.mixer.q_proj.weight", 0.07210463, 0.84504633, 0.00189876],
  ["mtp.layers.0.mixer.k_proj.weight", 0.07923321, 0.73475636, -0.00078808],
  ["mtp.layers.0.mixer.v_proj.weight", 0.07652878, 1.4920237, 0.00178488],
  ["mtp.layers.0.mixer.o_proj.weight", -0.00131592, 3.93251351, -0.0172364],
  ["mtp.layers.1.norm.weight", -0.07964178, 0.11855429, 0.00707051],
  ["mtp.layers.1.mixer.gate.weight", 0.00326154, 0.28793045, -0.00026598],
  ["mtp.layers.1.mixer.fc1_latent_proj.weight", -0.08482571, 1.30561785, 0.00245507],
  ["mtp.layers.1.mixer.fc2_latent_proj.weight", 0.10832478, 1.5361663, 0.010413],
  ["mtp.layers.1.mixer.experts.up_proj@0", -0.00173982, 0.36867608, -0.0008875],
  ["mtp.layers.1.mixer.experts.down_proj@0", -0.06922519, 0.22130224, -0.00636185],
  ["mtp.layers.1.mixer.experts.up_proj@7", -0.01797355, 0.41087708, -0.00186693],
  ["mtp.layers.1.mixer.experts.down_proj@7", 0.0588003, 0.34010883, 0.00198457],
  ["mtp.layers.1.mixer.shared_experts.up_proj.weight", -0.09883771, 1.5460763, 0.00409476],
  ["mtp.layers.1.mixer.shared_experts.down_proj.weight", 0.51020122, 1.7784462, 0.00028063],
  ["mtp.layers.1.final_layernorm.weight", 0.11982348, 0.15550673, -0.00792893],
];
