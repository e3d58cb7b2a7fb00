"""Every detail of the papers, with its code and the tests that verify it. ``stages conformance`` prints the table.

tests/conformance checks this table: all code and tests exist, and every test that is marked for a detail
(``@pytest.mark.detail("P6")``) is listed here. Ids: G general, D data, S supervised fine-tuning, R reward model, P PPO.

Papers: Z Ziegler et al. 2019, S Stiennon et al. 2020, I Ouyang et al. 2022, H Huang et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stages.process.tables import Table


@dataclass(frozen=True)
class Detail:
    """One detail. ``code``: ``file:name`` relative to stages/; ``tests``: ``file::test`` relative to tests/."""

    id: str
    what: str
    code: tuple[str, ...]
    tests: tuple[str, ...]


def _detail(id: str, what: str, code: str, tests: str) -> Detail:
    return Detail(id, what, tuple(code.split()), tuple(tests.split()))


NUMBERS = "conformance/test_numbers.py::test_function_returns_the_published_number"

DETAILS = (
    # General
    _detail(
        "G1",
        "A scalar head replaces the unembedding",
        "models/heads.py:ScalarModel",
        "conformance/test_details.py::test_scalar_head_replaces_the_unembedding",
    ),
    _detail(
        "G2",
        "Trained weights in fp32, forward passes in half precision",
        "ppo/roles.py:load_roles training/arguments.py:weights_dtype",
        "ppo/test_details.py::test_weights_are_fp32_while_the_forward_pass_is_half",
    ),
    _detail("G3", "Adam betas 0.9 and 0.95 (I)", "recipe/presets.py:PRESETS", "conformance/test_details.py::test_adam_of_the_presets"),
    _detail("G4", "Adam epsilon 1e-5 (Z, H)", "recipe/presets.py:PRESETS", "conformance/test_details.py::test_adam_of_the_presets"),
    _detail(
        "G5",
        "TensorFlow's Adam: epsilon outside the bias correction",
        "ppo/update/optimizers.py:TensorFlowAdam",
        f"{NUMBERS} ppo/test_optimizers.py::test_tensorflow_adam_by_hand",
    ),
    _detail(
        "G6",
        "Prompts that are too long are left out, not truncated",
        "ppo/data.py:load_prompts",
        "ppo/test_details.py::test_a_prompt_of_1001_tokens_is_left_out_and_not_cut",
    ),
    _detail(
        "G7",
        "A long query is shortened by its last lines; its format is kept (S, H)",
        "corpora/encoding/fitting.py:fit_prompt",
        "corpora/encoding/test_fitting.py::test_lines_are_cut_from_the_end_of_the_post "
        "corpora/encoding/test_fitting.py::test_a_single_line_is_cut_by_characters",
    ),
    _detail(
        "G8",
        "The format of a query (H)",
        "corpora/summaries.py:post_prompt",
        "corpora/encoding/test_fitting.py::test_the_form_of_a_post_is_the_papers",
    ),
    _detail(
        "G9",
        "A completion consists of a space, the text and the end token",
        "corpora/templates.py:encode_pair",
        "conformance/test_details.py::test_a_completion_begins_with_a_space_and_ends_with_the_end_token",
    ),
    _detail(
        "G10",
        "The pad token differs from the end token; padding does not change logits",
        "models/loading.py:ensure_pad_token models/passes/responses.py:sequence_batch",
        "conformance/test_details.py::test_logits_do_not_depend_on_padding "
        "conformance/test_details.py::test_the_pad_token_is_not_the_end_token",
    ),
    _detail(
        "G11",
        "Positions are counted along the attention mask",
        "sampling/readers.py:position_ids",
        "conformance/test_details.py::test_positions_follow_the_mask",
    ),
    _detail(
        "G12",
        "Dropout is disabled in reward model training and PPO",
        "models/layers/dropout.py:disable_dropout",
        "ppo/test_details.py::test_dropout_is_off_everywhere ppo/test_details.py::test_the_first_minibatch_has_ratio_one_and_no_kl",
    ),
    _detail(
        "G13",
        "Every process has its own random streams for sampling",
        "sampling/generation.py:episode_seed",
        "conformance/test_details.py::test_processes_sample_differently_from_one_order_of_prompts",
    ),
    _detail(
        "G14",
        "Learning rates: cosine to a tenth (I), linear to 0 (Z, S, H), constant after a warmup from a tenth (I)",
        "training/arguments.py:schedule_arguments ppo/update/optimizers.py:learning_rate_factor",
        "conformance/test_details.py::test_sixteen_epochs_of_cosine_to_a_tenth "
        "training/test_training.py::test_cosine_ends_at_the_final_fraction ppo/test_optimizers.py::test_schedules",
    ),
    # Data
    _detail(
        "D1",
        "Prompts with a long common prefix are deduplicated",
        "corpora/curation.py:Curator",
        "corpora/test_curation.py::test_prompts_with_the_same_prefix_are_deduplicated",
    ),
    _detail(
        "D2",
        "At most 200 prompts per user",
        "corpora/curation.py:Curator",
        "corpora/test_curation.py::test_the_two_hundred_and_first_prompt_of_a_user_is_dropped",
    ),
    _detail("D3", "Splits by user", "corpora/splits.py:hold_out", "corpora/test_splits.py::test_no_user_is_on_both_sides"),
    _detail(
        "D4",
        "Prompts with personal data are removed from the training split",
        "corpora/curation.py:PII",
        "corpora/test_curation.py::test_personal_data_is_dropped_or_masked",
    ),
    _detail(
        "D9",
        "K from 4 to 9 per prompt, ragged, with ties",
        "corpora/comparisons.py:comparison",
        "reward_model/test_reward_model.py::test_training_learns_preferences_and_centres_scores",
    ),
    _detail(
        "D10",
        "Lengths between 24 and 48 tokens",
        "corpora/curation.py:Curator",
        "corpora/test_curation.py::test_lengths_are_counted_in_tokens",
    ),
    _detail(
        "D11",
        "A model is measured on other data than it is selected on",
        "reward_model/run.py:run",
        "reward_model/test_reward_model.py::test_the_best_of_several_seeds_is_kept_and_measured_on_other_comparisons",
    ),
    _detail("D13", "Length caps of the TL;DR data", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_huang"),
    # Annotators
    _detail(
        "E2",
        "A Likert rating from 1 to 7 and eleven check boxes (I, table 3)",
        "labelling/config.py:Questions",
        "labelling/test_store.py::test_questions_of_instructgpt_are_those_of_table_3",
    ),
    # Supervised fine-tuning
    _detail(
        "S1",
        "16 epochs, cosine to a tenth, no warmup (I)",
        "recipe/presets.py:PRESETS training/arguments.py:schedule_arguments",
        "conformance/test_details.py::test_sixteen_epochs_of_cosine_to_a_tenth recipe/test_presets.py::test_instructgpt",
    ),
    _detail(
        "S2",
        "Dropout 0.2 on residual branches only (I)",
        "models/layers/dropout.py:set_residual_dropout",
        "models/layers/test_dropout.py::test_dropout_applies_only_to_residual_branches",
    ),
    _detail(
        "S3", "Learning rates and batch sizes by model size (I)", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_instructgpt"
    ),
    _detail(
        "S4",
        "The checkpoint with the highest reward model score is selected (I)",
        "training/selection.py:best_of training/selection.py:Selector",
        "training/test_selection.py::test_selection_uses_the_reward_instead_of_the_loss "
        "training/test_selection.py::test_best_model_of_the_run_is_published",
    ),
    _detail(
        "S5",
        "PPO's initial model: 2 epochs, 10 % pretraining rows (I)",
        "sft/config.py:SFTPretrainingMix recipe/presets.py:PRESETS",
        "sft/test_sft.py::test_pretraining_texts_are_a_tenth_of_the_rows recipe/test_presets.py::test_instructgpt",
    ),
    _detail("S6", "1 epoch, batch 128, cosine (S)", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_stiennon"),
    _detail(
        "S7",
        "The loss counts prompt and completion (H), or only the completion",
        "sft/rows.py:EncodedRow",
        "sft/test_sft.py::test_prompt_tokens_are_not_learned recipe/test_presets.py::test_huang",
    ),
    _detail(
        "S8",
        "Evaluation at temperature 0.01",
        "sampling/choosing.py:sample_tokens",
        "conformance/test_details.py::test_evaluation_at_temperature_0_01_samples_almost_greedily",
    ),
    # Reward model
    _detail("R1", "-log sigmoid of the score difference", "rl/ranking.py:ranking_loss", NUMBERS),
    _detail(
        "R2",
        "All C(K, 2) pairs of a prompt are one batch element; K rows are scored",
        "rl/ranking.py:ranking_loss",
        f"{NUMBERS} reward_model/test_reward_model.py::test_every_completion_is_scored_once",
    ),
    _detail(
        "R3",
        "A prompt is never split across steps",
        "reward_model/rows.py:collate",
        "conformance/test_details.py::test_a_prompt_is_one_element_of_a_batch "
        "reward_model/test_reward_model.py::test_collated_batch_keeps_all_completions_of_a_prompt",
    ),
    _detail(
        "R4",
        "Ties are dropped",
        "rl/ranking.py:ranking_pairs",
        "rl/test_ranking.py::test_prompt_with_only_ties_does_not_change_the_mean "
        "rl/test_ranking.py::test_pairs_leave_out_ties_and_other_prompts",
    ),
    _detail(
        "R5",
        "Softmax loss on the best of K completions (Z)",
        "rl/ranking.py:best_of_losses",
        f"{NUMBERS} rl/test_ranking.py::test_best_of_ranked_completions_by_hand "
        "reward_model/test_reward_model.py::test_training_with_best_of_loss_runs_on_best_of_data",
    ),
    _detail(
        "R7",
        "One epoch; a warning for more",
        "reward_model/run.py:run",
        "conformance/test_details.py::test_more_than_one_epoch_gives_a_warning",
    ),
    _detail(
        "R8",
        "Several seeds; the best on validation data is kept (S)",
        "reward_model/run.py:run",
        "reward_model/test_reward_model.py::test_the_best_of_several_seeds_is_kept_and_measured_on_other_comparisons",
    ),
    _detail(
        "R10",
        "The head's weights are initialized with standard deviation 1 / sqrt(d + 1)",
        "models/heads.py:RewardModel",
        f"{NUMBERS} conformance/test_details.py::test_the_head_of_a_wide_model_is_drawn_within_five_percent",
    ),
    _detail(
        "R11",
        "The mean reward of demonstrations is 0; the bias is stored",
        "models/heads.py:RewardModel",
        "reward_model/test_reward_model.py::test_training_learns_preferences_and_centres_scores "
        "models/test_heads.py::test_centring_subtracts_and_survives_reload",
    ),
    _detail(
        "R12",
        "Rewards have mean 0 and variance 1 on the policy's samples (Z)",
        "reward_model/config.py:Normalization models/heads.py:RewardModel",
        "reward_model/test_reward_model.py::test_standardizing_on_samples",
    ),
    _detail(
        "R13",
        "The score is read at the last token",
        "models/heads.py:last_positions",
        "conformance/test_details.py::test_tokens_after_the_end_do_not_change_the_score",
    ),
    _detail(
        "R14",
        "The reward model reads prompt and completion",
        "rewards/learned.py:RewardModelSource",
        "conformance/test_details.py::test_the_reward_model_reads_the_prompt",
    ),
    _detail(
        "R15",
        "Left and right padding give nearly equal scores",
        "models/heads.py:ScalarModel",
        "conformance/test_details.py::test_left_and_right_padding_agree_up_to_rounding",
    ),
    _detail(
        "R16",
        "Accuracy by length difference, and the win rate of the longer text",
        "reward_model/preferences.py:agreement",
        "reward_model/test_reward_model.py::test_accuracy_by_length_and_by_group_by_hand",
    ),
    _detail(
        "R17",
        "Calibration",
        "stats/classification.py:expected_calibration_error",
        "stats/test_classification.py::test_calibration_by_hand "
        "reward_model/test_reward_model.py::test_calibration_is_computed_without_the_gain",
    ),
    _detail(
        "R18",
        "Accuracy by batch, confidence or any column",
        "reward_model/preferences.py:agreement",
        "reward_model/test_reward_model.py::test_groups_come_from_the_data "
        "reward_model/test_reward_model.py::test_accuracy_by_length_and_by_group_by_hand",
    ),
    _detail(
        "R19",
        "Cross-validation over groups of annotators",
        "corpora/splits.py:hold_out",
        "corpora/test_splits.py::test_folds_hold_out_every_group_once "
        "corpora/test_splits.py::test_annotators_of_the_embedded_world_are_folds",
    ),
    _detail(
        "R20",
        "Reward model and policy may have different families and vocabularies",
        "rewards/learned.py:RewardModelSource",
        "conformance/test_details.py::test_a_reward_model_of_another_family_and_vocabulary_scores_texts "
        "ppo/test_details.py::test_the_value_network_falls_back_on_the_policy",
    ),
    # PPO
    _detail(
        "P3",
        "Per-token KL penalty from the rollout's log-probabilities; the score is added at the last token",
        "rl/shaping.py:shape_rewards",
        f"{NUMBERS} ppo/test_details.py::test_rewards_add_up_to_the_score_and_their_kl_is_the_rollouts "
        "ppo/test_details.py::test_the_first_minibatch_has_ratio_one_and_no_kl",
    ),
    _detail(
        "P4",
        "KL coefficients of the papers",
        "recipe/presets.py:PRESETS",
        "recipe/test_presets.py::test_instructgpt recipe/test_presets.py::test_ziegler",
    ),
    _detail(
        "P5",
        "Adaptive KL coefficient",
        "rl/kl.py:AdaptiveKLController",
        f"{NUMBERS} rl/test_kl.py::test_the_adaptive_coefficient_moves_by_the_clipped_error",
    ),
    _detail(
        "P6",
        "Generalised advantage estimation",
        "rl/gae.py:gae",
        f"{NUMBERS} rl/test_gae.py::test_padded_batch_equals_its_rows_computed_separately",
    ),
    _detail(
        "P7",
        "Returns are computed before whitening",
        "ppo/update/targets.py:targets",
        "ppo/test_details.py::test_returns_come_before_the_whitening",
    ),
    _detail(
        "P8",
        "Advantage whitening: biased variance, masked",
        "rl/masking.py:whiten",
        f"{NUMBERS} ppo/test_details.py::test_returns_come_before_the_whitening",
    ),
    _detail("P9", "Reward whitening keeps the mean", "rl/masking.py:scale_to_unit_variance", NUMBERS),
    _detail(
        "P10",
        "Whitening and GAE within the minibatch (Z), per process (H), or over the rollout",
        "ppo/update/targets.py:all_targets",
        "ppo/test_details.py::test_whitening_by_minibatch_needs_eight_episodes "
        "ppo/test_rollout.py::test_whitening_by_process_whitens_each_share_separately",
    ),
    _detail("P11", "Clipped objective", "rl/losses.py:policy_terms", NUMBERS),
    _detail("P12", "Clipped value loss", "rl/losses.py:value_terms", NUMBERS),
    _detail(
        "P13",
        "A separate value network, initialized from the reward model",
        "ppo/roles.py:load_roles",
        "ppo/test_details.py::test_value_network_is_separate_and_starts_from_the_reward_model",
    ),
    _detail(
        "P14",
        "Or a shared value head, initialized with 0 (Z)",
        "ppo/roles.py:load_roles",
        "ppo/test_details.py::test_a_shared_head_begins_with_values_of_zero",
    ),
    _detail(
        "P15",
        "512 episodes in 8 minibatches, one epoch; 4000 optimizer steps (I)",
        "recipe/presets.py:PRESETS",
        "recipe/test_presets.py::test_instructgpt recipe/test_presets.py::test_batch_sizes_scale",
    ),
    _detail(
        "P17",
        "Constant learning rate after ten iterations of warmup from a tenth (I)",
        "ppo/update/optimizers.py:learning_rate_factor",
        "recipe/test_presets.py::test_instructgpt ppo/test_optimizers.py::test_warmup_from_a_tenth",
    ),
    _detail(
        "P18",
        "Average of weights in fp32: saved, resumed and published",
        "ppo/update/optimizers.py:WeightAverage",
        f"{NUMBERS} ppo/test_optimizers.py::test_average_of_half_precision_weights_keeps_small_steps "
        "ppo/test_loop.py::test_weight_average_is_published "
        "ppo/test_checkpoint.py::test_run_interrupted_anywhere_ends_like_an_uninterrupted_one",
    ),
    _detail(
        "P19",
        "PPO-ptx: pretraining gradients are added to the policy's gradients",
        "ppo/update/gradients.py:Gradients",
        "ppo/test_update.py::test_pretraining_gradient_is_added_with_its_coefficient "
        "ppo/test_details.py::test_a_coefficient_of_zero_is_plain_ppo_to_the_bit",
    ),
    _detail(
        "P20",
        "PPO-ptx reduces forgetting",
        "ppo/update/gradients.py:Gradients",
        "ppo/test_details.py::test_pretraining_mix_halves_the_loss_increase",
    ),
    _detail(
        "P21",
        "Sampler, policy and reference use the same temperature",
        "models/passes/responses.py:Policy",
        f"{NUMBERS} ppo/test_details.py::test_recomputed_logprobs_are_the_samplers",
    ),
    _detail(
        "P22",
        "Sampling without top-k or top-p",
        "config.py:GenerationSettings",
        "ppo/test_details.py::test_recomputed_logprobs_are_the_samplers",
    ),
    _detail(
        "P23",
        "Tokens after the end token are ignored everywhere",
        "sampling/generation.py:generate",
        f"{NUMBERS} ppo/test_details.py::test_tokens_after_the_end_are_not_counted",
    ),
    _detail(
        "P24",
        "Truncation at a token at or after a position; the reward model reads the truncated text",
        "sampling/generation.py:ending_tokens",
        "ppo/test_details.py::test_truncation_at_a_token_after_a_position",
    ),
    _detail(
        "P25",
        "The score of a completion without an end is replaced (Z, H) or reduced",
        "rl/shaping.py:penalize_missing_eos",
        f"{NUMBERS} rl/test_shaping.py::test_missing_eos_replaces_or_reduces_the_score "
        "ppo/test_details.py::test_truncation_at_a_token_after_a_position",
    ),
    _detail(
        "P26",
        "Only completions that pass the filter are shown to annotators (Z)",
        "reward_model/collection_config.py:Collection",
        "reward_model/test_collection.py::test_only_finished_completions_are_ranked",
    ),
    _detail(
        "P27",
        "The score is added one state after the end if there is room (H)",
        "ppo/update/targets.py:targets",
        "ppo/test_rollout.py::test_score_is_credited_to_an_extra_state_after_the_last_token "
        "ppo/test_update.py::test_gradients_equal_the_slow_reference_for_any_microbatch",
    ),
    _detail(
        "P28",
        "Values of a truncated response are computed on the truncated text",
        "ppo/rollout/collecting.py:collect",
        "ppo/test_details.py::test_tokens_after_the_end_are_not_counted",
    ),
    _detail(
        "P29",
        "The presets use neither early stopping by KL nor gradient clipping",
        "recipe/presets.py:PRESETS",
        "ppo/test_details.py::test_early_stopping_and_clipping_of_gradients_are_off_in_the_presets",
    ),
    _detail("P31", "Settings of Huang et al.", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_huang"),
    _detail("P32", "Settings of Stiennon et al.", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_stiennon"),
    _detail("P33", "Settings of Ziegler et al.", "recipe/presets.py:PRESETS", "recipe/test_presets.py::test_ziegler"),
    _detail(
        "P34",
        "Metrics exclude padding",
        "ppo/records/metrics.py:iteration_metrics",
        f"{NUMBERS} ppo/test_details.py::test_the_metrics_of_the_papers_are_there_without_padding",
    ),
    _detail("P35", "The sign of the reward", "ppo/loop.py:run", "ppo/test_loop.py::test_reward_or_penalty_of_a_token_changes_its_share"),
    _detail(
        "P36",
        "Reward model and policy share no trained weights",
        "rewards/learned.py:RewardModelSource",
        "conformance/test_details.py::test_a_reward_model_of_another_family_and_vocabulary_scores_texts",
    ),
    _detail(
        "P37",
        "Comparisons of the last policy's samples, and their lineage",
        "reward_model/collection.py:collect_comparisons",
        "ppo/test_details.py::test_a_policy_s_samples_become_labels_of_the_next_reward_model",
    ),
    _detail(
        "P38",
        "The reference may be a model other than the initial policy",
        "ppo/roles.py:load_roles",
        "ppo/test_details.py::test_the_reference_may_be_another_model",
    ),
)


def conformance_table(details: Iterable[Detail] = DETAILS) -> Table:
    """The table for a terminal: id, detail, code, tests."""
    table = Table("id", "detail", "code (stages/)", "tests (tests/)", title="The papers' details", title_justify="left")
    for detail in details:
        table.add_row(detail.id, detail.what, " ".join(detail.code), " ".join(detail.tests))
    return table
