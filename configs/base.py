"""Every knob once, with its meaning. Other configs start from `get_config()` here and change a few lines."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults; a stand-alone run needs at least `data.store`."""
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict(
        dict(
            store="",  # event store directory, made by wallwm_jax.build_events
            split="train",  # train | heldout
            window_kind="event",  # event | fixed | history | random
            levels={"subtask": 0.5, "action": 0.5},  # share of drawn events per level (event windows)
            mixture=(),  # share of drawn windows per dataset, by beginnings of names: (("ocbench/", 0.8), ("", 0.2))
            lengths=(),  # share of drawn windows up to so many latents, above the bucket before: ((5, 0.5), (17, 0.5))
            views=(),  # view names in order; () takes the store's
            rows=4,  # B: global rows per step
            latents_per_row=34,  # F
            actions_per_row=256,  # A
            events_per_row=16,  # E
            text_length=96,  # L: caption tokens kept per event
            draw_block_rows=64,  # R: rows packed together; below 32 the fill suffers
            fill_target=0.98,  # share of R * F latents a block is planned to hold; less where lengths leave gaps
            balance="product",  # product (weights n_vl^-a * n_act^-b) | raking (clusters of both get n^(1-a), n^(1-b))
            vl_power=0.5,  # a; (0, 0) is uniform sampling
            action_power=0.5,  # b
            weight_clip=10.0,  # weights stay within [1/clip, clip] times their mean
            parent_caption_prob=0.3,  # prefix a caption by its parent's
            paraphrase_prob=0.5,  # draw one of the paraphrases instead of the caption
            chunk_event_prob=0.0,  # of a window with history to be told the event of the levels above that is going on
            caption="own",  # own (of an event; else the instruction) | instruction | events (also those inside a tile)
            duration_clause_prob=0.3,  # append "takes 2.5 s"
            caption_drop=0.1,  # replace the caption by the null text, for guidance
            caption_drop_long=0.9,  # the same for events of caption_drop_lengths[1] steps and more
            caption_drop_lengths=(129, 220),  # control steps between which the probability rises along a cosine
            max_bad_records=100,  # abort when more records than this fail their checksum
            workers=1,  # Grain worker processes; 0 loads in a thread
            prefetch=4,  # batches ready ahead of the device
            vlm=ConfigDict(  # rows of the VLM stages: one event each, of window_kind event
                dict(
                    image_size=64,  # pixels of a picture's side, a multiple of vlm.vision's patch * merge
                    previous_images=False,  # also show the observation at which the event before began
                    length=512,  # S: tokens of prompt and answer; old history is left out where it does not fit
                    answer_length=112,  # of these, kept for the answer
                    trace_length=384,  # T: tokens of the reasoning trace
                    answer="event",  # event (caption and duration) | trace (reasoning trace that ends with them)
                    done_prob=0.5,  # of an episode's last event to be seen at its end, where the task is done
                    inside_prob=0.0,  # of an event to be seen at a later keyframe: how long does it still take?
                )
            ),
        )
    )

    config.model = ConfigDict(
        dict(
            latent_shape=(8, 8),  # h, w: latent cells per view
            latent_channels=768,  # C, from the codec
            patch=(2, 2),  # cells per token
            width=128,  # video tower
            depth=4,  # blocks, of both towers
            heads=4,
            ffn=512,
            freq_dim=256,  # sinusoidal timestep features
            max_views=8,  # rows of the camera table; row 0 is the unknown camera
            view_attention=True,
            place_embedding=False,  # a learned vector per camera and patch; for small towers that start from nothing
            sight_cone=ConfigDict(  # patches of two cameras attend to each other where their sight cones meet
                dict(
                    on=True,  # needs calibrated cameras; a batch without calibration leaves all open
                    near=0.1,  # metres between which cones must meet
                    far=3.0,
                    widen=1.25,  # factor on the radius of a cone around its patch
                )
            ),
            action_width=128,
            action_heads=4,
            action_ffn=512,
            action_dim=32,  # Da = Ds
            actions_per_latent=8,  # K_p
            video_prediction="velocity",  # velocity | clean (x-prediction): what the video head's output means
            action_prediction="velocity",  # the same for the action head
            max_latents=17,  # future positions of the E_tau table: -max..max
            max_windows=64,  # rows of the E_abs table: windows along an episode, in windows with history
            text=ConfigDict(
                dict(
                    kind="bytes",  # bytes (trained with the model) | features (cached, frozen encoder)
                    width=128,  # Dt
                    depth=2,  # bytes encoder blocks
                    heads=4,
                    stride=4,  # bytes merged into one token by the bytes encoder
                    ngrams=(3, 4, 6),  # lengths of the byte n-grams that have embeddings of their own
                    ngram_rows=4096,  # rows of each table of them; an n-gram's row is its hash
                    pad_to=0,  # 512 reproduces Wan's zero padding as one biased key; 0 masks padding
                )
            ),
            duration_quantiles=(0.1, 0.5, 0.9),
            compute_dtype="float32",  # float32 | bfloat16; parameters, softmax and accumulations stay float32
            remat="none",  # none | products | most | selective | attention | full: what is kept, models/layer_stack.py
        )
    )

    config.vlm = ConfigDict(  # the vision-language model, and what reads it; the defaults train on a CPU
        dict(
            tokenizer="bytes",  # bytes | words (of OCBench's captions) | folder with the published tokenizer.json
            language=_language(width=128, ffn=256, depth=8),
            vision=ConfigDict(  # models.vlm.vision_tower.VisionConfig
                dict(width=32, heads=2, ffn=64, depth=2, patch=8, frames=2, merge=2, positions=16)
            ),
            small=_language(width=96, ffn=192, depth=4),  # the language model that reads reasoning traces
            # Stage staircase: layers of the VLM below each latent's entry. Four stairs of these 8 layers; of the
            # published 32 take eight, every fourth, as in the README: tuple(range(0, 32, 4)).
            entry_depths=(0, 2, 4, 6),
            resampler_depth=2,  # blocks between the VLM's features and the video tower's text space
            compute_dtype="float32",  # float32 | bfloat16
            remat="none",  # as model.remat
        )
    )

    config.objective = ConfigDict(
        dict(
            video_shift=5.0,  # sigma = shift * u / (1 + (shift - 1) * u), u uniform
            action_shift=1.0,
            action_draws=4,  # K noise draws of the actions per video forward
            action_sigma="independent",  # symmetric (= video sigma) | independent
            dct_weight=0.0,  # of the auxiliary loss on the actions' cosine transform; off in the paper's main runs
            video_sigma_power=0.0,  # the video loss at noise level sigma weighs sigma ** this
            action_sigma_power=0.0,  # the same for the action loss
            anchor_sigma=0.357,  # stage action: video noise level, step 45 of 50 at shift 5
            anchor_jitter_steps=2,
            schedule_steps=50,
            tube=ConfigDict(  # hide a window of one view through a whole event; off in the paper's main recipe
                dict(
                    prob=0.0,  # of an event to have one
                    clean_prob=0.5,  # of a tube to hide its window in the event's first latent, too
                    sides=(1, 2),  # smallest and largest window, in patches
                    weight=1.0,  # of the video loss inside a tube
                )
            ),
            video_weight=1.0,
            action_weight=1.0,
            duration_weight=0.1,
            answer_weight=1.0,  # stage vlm_sft: cross-entropy of the VLM's answer
            small_weight=1.0,  # and of the small language model's reasoning trace
            align_weight=1.0,  # stage vlm_text: distance to the text encoder's features, per channel variance
            next_weight=0.1,  # cross-entropy of the answer by a head on the frozen VLM
            time_weight=0.1,  # Huber loss of the remaining log-seconds
            trace_weight=1.0,  # stage staircase: cross-entropy of the trace that the small model reads from the latents
            match_weight=1.0,  # distance of what the video tower reads from them to what it reads from the caption
            latent_action_weight=0.0,  # the frozen towers' action loss with the latents in the caption's place
            latent_video_weight=0.0,  # their video loss, too; at 0 both, rows hold no windows and no tower runs
            present_weight=0.1,  # cross-entropy of which features are text, not padding
        )
    )

    config.optim = ConfigDict(
        dict(
            name="muon",  # muon | adamw
            lr=1e-3,  # peak, for AdamW leaves
            muon_lr=2e-3,  # peak, for Muon matrices; update scale 0.2 * sqrt(max(m, n))
            warmup_steps=50,
            final_lr_fraction=0.05,
            weight_decay=0.01,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            muon_momentum=0.95,
            muon_dtype="float32",  # of Muon's iteration and of what its chips exchange; bfloat16 on TPU
            coefficients="polar_express",  # polar_express | jordan | you: the polynomials of the iteration
            neuron_decay=0.0,  # decay of NorMuon's mean squares, such as 0.95; 0 leaves NorMuon out
            cautious_decay=False,  # decay only what the update makes smaller, too
            clip_norm=1.0,  # global, before momentum
        )
    )

    config.train = ConfigDict(
        dict(
            stage="joint",  # joint | video | action | chunk | vlm_sft | vlm_text | staircase
            init_from="",  # workdir, checkpoint or converted weights: parameters are restored where they match
            text_from="",  # vlm_text, staircase: run of a world action model, to whose reading of text they are aligned
            steps=1000,
            max_seconds=0.0,  # safety stop after this much training time, whatever the schedule; 0 never
            log_every=10,
            save_every=500,  # steps between checkpoints
            save_minutes=0.0,  # also save when the last one is this old, looked at every log_every steps; 0 never
            heldout_every=0,  # steps between evaluations of the losses on the store's heldout split; 0 never
            heldout_batches=4,  # of data.rows rows, the same each time
            keep_checkpoints=3,  # newest ones kept
            keep_every=0,  # keep those at multiples of this many steps for good; 0 none
            max_failed_saves=3,  # abort when more saves in a row than this fail, as on a full disk
            hang_seconds=1800.0,  # a phase (step, data, compile, ...) longer than this prints all stacks; 0 never
            hang_aborts=False,  # also end the process then, so that a launcher can start all again with --resume
            dump_hlo=False,  # write the compiled step, its memory and cost to WORKDIR/hlo
            ema_decay=0.9999,  # of the average that is evaluated and served; 0 keeps none, and the parameters are
        )
    )

    config.mesh_preset = ""  # "v5p:4x4x8": sizes for that slice by parallel/presets.py, instead of these
    config.mesh = ConfigDict(dict(slice=1, data=1, fsdp=-1, context=1, tensor=1))

    config.sampling = ConfigDict(
        dict(
            sampler="anchored",  # anchored | symmetric
            steps=10,  # Euler steps of the action stream (symmetric: of both)
            video_steps=5,  # Euler steps of the video stream from noise to anchor_sigma (anchored)
            action_draws=1,  # actions are the mean of this many draws on one video
            action_temperature=1.0,  # scale of the starting noise; 0 is near the mean of what the model expects
            guidance=1.0,
            buckets=(5, 9, 13, 17),  # latents per event, rounded up; one compilation each
        )
    )
    return config.lock()


def _language(**sizes: int) -> ConfigDict:
    """A Qwen3.5 language model over bytes; `models.vlm.config.LanguageConfig` says what each size is."""
    config = ConfigDict(
        dict(
            vocabulary=264,
            interval=4,
            heads=4,
            kv_heads=2,
            head_dim=32,
            rotary_dim=16,
            rope_theta=1e4,
            mrope_section=(4, 2, 2),
            linear_key_heads=2,
            linear_value_heads=4,
            linear_key_dim=32,
            linear_value_dim=32,
            linear_conv=4,
            tied=True,
        )
    )
    config.update(sizes)
    return config
