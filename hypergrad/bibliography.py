"""The papers and packages that the library rests on, as BibTeX by key."""


def _entry(kind: str, key: str, **fields: str) -> tuple[str, str]:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return key, "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _article(
    key: str, author: str, title: str, journal: str, **rest: str
) -> tuple[str, str]:
    return _entry("article", key, author=author, title=title, journal=journal, **rest)


def _paper(
    key: str, author: str, title: str, booktitle: str, arxiv: str
) -> tuple[str, str]:
    fields = {"author": author, "title": title, "booktitle": booktitle}
    preprint = {"eprint": arxiv, "archiveprefix": "arXiv"}
    return _entry("inproceedings", key, **fields, year=key[-4:], **preprint)


_AAAI = "AAAI Conference on Artificial Intelligence"
_CVPR = "IEEE Conference on Computer Vision and Pattern Recognition"
_ICML = "International Conference on Machine Learning"
_AISTATS = "International Conference on Artificial Intelligence and Statistics"
_NEURIPS = "Advances in Neural Information Processing Systems"

BIBTEX: dict[str, str] = dict(
    [
        _entry(
            "software",
            "hypergrad",
            author="{The hypergrad authors}",
            title="hypergrad: hypergradients in {JAX}",
            note="Python package hypergrad-jax",
        ),
        _paper(
            "pedregosa2016",
            "Pedregosa, Fabian",
            "Hyperparameter optimization with approximate gradient",
            _ICML,
            "1602.02355",
        ),
        _paper(
            "lorraine2020",
            "Lorraine, Jonathan and Vicol, Paul and Duvenaud, David",
            "Optimizing Millions of Hyperparameters by Implicit Differentiation",
            _AISTATS,
            "1911.02590",
        ),
        _paper(
            "rajeswaran2019",
            "Rajeswaran, Aravind and Finn, Chelsea and Kakade, Sham M. and Levine, "
            "Sergey",
            "Meta-Learning with Implicit Gradients",
            _NEURIPS,
            "1909.04630",
        ),
        _paper(
            "hataya2023",
            "Hataya, Ryuichiro and Yamada, Makoto",
            r"{Nystr{\"o}m} Method for Accurate and Scalable Implicit Differentiation",
            _AISTATS,
            "2302.09726",
        ),
        _article(
            "frangella2023",
            "Frangella, Zachary and Tropp, Joel A. and Udell, Madeleine",
            r"Randomized {Nystr{\"o}m} Preconditioning",
            "SIAM Journal on Matrix Analysis and Applications",
            volume="44",
            number="2",
            year="2023",
            eprint="2110.02820",
            archiveprefix="arXiv",
        ),
        _paper(
            "luketina2016",
            "Luketina, Jelena and Berglund, Mathias and Greff, Klaus and Raiko, Tapani",
            "Scalable Gradient-Based Tuning of Continuous Regularization "
            "Hyperparameters",
            _ICML,
            "1511.06727",
        ),
        _paper(
            "franceschi2017",
            "Franceschi, Luca and Donini, Michele and Frasconi, Paolo and Pontil, "
            "Massimiliano",
            "Forward and Reverse Gradient-Based Hyperparameter Optimization",
            _ICML,
            "1703.01785",
        ),
        _paper(
            "dagreou2022",
            "Dagr{\\'e}ou, Mathieu and Ablin, Pierre and Vaiter, Samuel and Moreau, "
            "Thomas",
            "A Framework for Bilevel Optimization That Enables Stochastic and Global "
            "Variance Reduction Algorithms",
            _NEURIPS,
            "2201.13409",
        ),
        _paper(
            "dagreou2024",
            "Dagr{\\'e}ou, Mathieu and Moreau, Thomas and Vaiter, Samuel and Ablin, "
            "Pierre",
            "A Lower Bound and a Near-Optimal Algorithm for Bilevel Empirical Risk "
            "Minimization",
            _AISTATS,
            "2302.08766",
        ),
        _paper(
            "defazio2014",
            "Defazio, Aaron and Bach, Francis and Lacoste-Julien, Simon",
            "{SAGA}: A Fast Incremental Gradient Method With Support for Non-Strongly "
            "Convex Composite Objectives",
            _NEURIPS,
            "1407.0202",
        ),
        _paper(
            "nguyen2017",
            "Nguyen, Lam M. and Liu, Jie and Scheinberg, Katya and Tak{\\'a}{\\v{c}}, "
            "Martin",
            "{SARAH}: A Novel Method for Machine Learning Problems Using Stochastic "
            "Recursive Gradient",
            _ICML,
            "1703.00102",
        ),
        _paper(
            "fang2018",
            "Fang, Cong and Li, Chris Junchi and Lin, Zhouchen and Zhang, Tong",
            "{SPIDER}: Near-Optimal Non-Convex Optimization via Stochastic "
            "Path-Integrated Differential Estimator",
            _NEURIPS,
            "1807.01695",
        ),
        _paper(
            "cutkosky2019",
            "Cutkosky, Ashok and Orabona, Francesco",
            "Momentum-Based Variance Reduction in Non-Convex {SGD}",
            _NEURIPS,
            "1905.10018",
        ),
        _paper(
            "ji2021",
            "Ji, Kaiyi and Yang, Junjie and Liang, Yingbin",
            "Bilevel Optimization: Convergence Analysis and Enhanced Design",
            _ICML,
            "2010.07962",
        ),
        _paper(
            "arbel2022",
            "Arbel, Michael and Mairal, Julien",
            "Amortized Implicit Differentiation for Stochastic Bilevel Optimization",
            "International Conference on Learning Representations",
            "2111.14580",
        ),
        _article(
            "hong2023",
            "Hong, Mingyi and Wai, Hoi-To and Wang, Zhaoran and Yang, Zhuoran",
            "A Two-Timescale Stochastic Algorithm Framework for Bilevel Optimization: "
            "Complexity Analysis and Application to Actor-Critic",
            "SIAM Journal on Optimization",
            year="2023",
            eprint="2007.05170",
            archiveprefix="arXiv",
        ),
        _paper(
            "yang2021",
            "Yang, Junjie and Ji, Kaiyi and Liang, Yingbin",
            "Provably Faster Algorithms for Bilevel Optimization",
            _NEURIPS,
            "2106.04692",
        ),
        _paper(
            "khanduri2021",
            "Khanduri, Prashant and Zeng, Siliang and Hong, Mingyi and Wai, Hoi-To and "
            "Wang, Zhaoran and Yang, Zhuoran",
            "A Near-Optimal Algorithm for Stochastic Bilevel Optimization via "
            "Double-Momentum",
            _NEURIPS,
            "2102.07367",
        ),
        _paper(
            "li2022",
            "Li, Junyi and Gu, Bin and Huang, Heng",
            "A Fully Single Loop Algorithm for Bilevel Optimization without {Hessian} "
            "Inverse",
            _AAAI,
            "2112.04660",
        ),
        _paper(
            "kwon2023",
            "Kwon, Jeongyeol and Kwon, Dohyun and Wright, Stephen and Nowak, Robert D.",
            "A Fully First-Order Method for Stochastic Bilevel Optimization",
            _ICML,
            "2301.10945",
        ),
        _paper(
            "liu2022",
            "Liu, Bo and Ye, Mao and Wright, Stephen and Stone, Peter and Liu, Qiang",
            "{BOME!} Bilevel Optimization Made Easy: A Simple First-Order Approach",
            _NEURIPS,
            "2209.08709",
        ),
        _paper(
            "sow2022",
            "Sow, Daouda and Ji, Kaiyi and Liang, Yingbin",
            "On the Convergence Theory for {Hessian}-Free Bilevel Algorithms",
            _NEURIPS,
            "2110.07004",
        ),
        _paper(
            "shaban2019",
            "Shaban, Amirreza and Cheng, Ching-An and Hatch, Nathan and Boots, Byron",
            "Truncated Back-propagation for Bilevel Optimization",
            _AISTATS,
            "1810.10667",
        ),
        _paper(
            "grazzi2020",
            "Grazzi, Riccardo and Franceschi, Luca and Pontil, Massimiliano and Salzo, "
            "Saverio",
            "On the Iteration Complexity of Hypergradient Computation",
            _ICML,
            "2006.16218",
        ),
        _paper(
            "maclaurin2015",
            "Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.",
            "Gradient-based Hyperparameter Optimization through Reversible Learning",
            _ICML,
            "1502.03492",
        ),
        _article(
            "liu1989",
            "Liu, Dong C. and Nocedal, Jorge",
            "On the limited memory {BFGS} method for large scale optimization",
            "Mathematical Programming",
            volume="45",
            year="1989",
        ),
        _paper(
            "maclaurin2015",
            "Maclaurin, Dougal and Duvenaud, David and Adams, Ryan P.",
            "Gradient-based Hyperparameter Optimization through Reversible Learning",
            _ICML,
            "1502.03492",
        ),
        _paper(
            "micaelli2021",
            "Micaelli, Paul and Storkey, Amos",
            "Gradient-based Hyperparameter Optimization Over Long Horizons",
            _NEURIPS,
            "2007.07869",
        ),
        _paper(
            "grazzi2020",
            "Grazzi, Riccardo and Franceschi, Luca and Pontil, Massimiliano and Salzo, "
            "Saverio",
            "On the Iteration Complexity of Hypergradient Computation",
            _ICML,
            "2006.16218",
        ),
        _paper(
            "liu2019",
            "Liu, Hanxiao and Simonyan, Karen and Yang, Yiming",
            "{DARTS}: Differentiable Architecture Search",
            "International Conference on Learning Representations",
            "1806.09055",
        ),
        _paper(
            "shen2023",
            "Shen, Han and Chen, Tianyi",
            "On Penalty-based Bilevel Gradient Descent Method",
            _ICML,
            "2302.05185",
        ),
        _article(
            "scellier2017",
            "Scellier, Benjamin and Bengio, Yoshua",
            "Equilibrium Propagation: Bridging the Gap between Energy-Based Models and "
            "Backpropagation",
            "Frontiers in Computational Neuroscience",
            volume="11",
            year="2017",
            eprint="1602.05179",
            archiveprefix="arXiv",
        ),
        _article(
            "salimans2017",
            "Salimans, Tim and Ho, Jonathan and Chen, Xi and Sidor, Szymon and "
            "Sutskever, Ilya",
            "Evolution Strategies as a Scalable Alternative to Reinforcement Learning",
            "arXiv preprint arXiv:1703.03864",
            year="2017",
            eprint="1703.03864",
            archiveprefix="arXiv",
        ),
        _paper(
            "vicol2021",
            "Vicol, Paul and Metz, Luke and Sohl-Dickstein, Jascha",
            "Unbiased Gradient Estimation in Unrolled Computation Graphs with "
            "Persistent Evolution Strategies",
            _ICML,
            "2112.13835",
        ),
        _article(
            "bergstra2012",
            "Bergstra, James and Bengio, Yoshua",
            "Random Search for Hyper-Parameter Optimization",
            "Journal of Machine Learning Research",
            volume="13",
            year="2012",
        ),
        _entry(
            "inproceedings",
            "bergstra2011",
            author=r"Bergstra, James and Bardenet, R{\'e}mi and Bengio, Yoshua and "
            r"K{\'e}gl, Bal{\'a}zs",
            title="Algorithms for Hyper-Parameter Optimization",
            booktitle=_NEURIPS,
            year="2011",
        ),
        _paper(
            "akiba2019",
            "Akiba, Takuya and Sano, Shotaro and Yanase, Toshihiko and Ohta, Takeru "
            "and Koyama, Masanori",
            "{Optuna}: A Next-generation Hyperparameter Optimization Framework",
            "ACM SIGKDD International Conference on Knowledge Discovery and Data "
            "Mining",
            "1907.10902",
        ),
        _article(
            "deb2002",
            "Deb, Kalyanmoy and Pratap, Amrit and Agarwal, Sameer and Meyarivan, T.",
            "A fast and elitist multiobjective genetic algorithm: {NSGA-II}",
            "IEEE Transactions on Evolutionary Computation",
            volume="6",
            number="2",
            year="2002",
        ),
        _article(
            "hansen2001",
            "Hansen, Nikolaus and Ostermeier, Andreas",
            "Completely Derandomized Self-Adaptation in Evolution Strategies",
            "Evolutionary Computation",
            volume="9",
            number="2",
            year="2001",
        ),
        _article(
            "lange2022",
            "Lange, Robert Tjarko",
            "{evosax}: {JAX}-based Evolution Strategies",
            "arXiv preprint arXiv:2212.04180",
            year="2022",
            eprint="2212.04180",
            archiveprefix="arXiv",
        ),
        _article(
            "nomura2024",
            "Nomura, Masahiro and Shibata, Masashi",
            "{cmaes}: A Simple yet Practical {Python} Library for {CMA-ES}",
            "arXiv preprint arXiv:2402.01373",
            year="2024",
            eprint="2402.01373",
            archiveprefix="arXiv",
        ),
        _article(
            "jones1998",
            "Jones, Donald R. and Schonlau, Matthias and Welch, William J.",
            "Efficient Global Optimization of Expensive Black-Box Functions",
            "Journal of Global Optimization",
            volume="13",
            year="1998",
        ),
        _paper(
            "snoek2012",
            "Snoek, Jasper and Larochelle, Hugo and Adams, Ryan P.",
            "Practical {Bayesian} Optimization of Machine Learning Algorithms",
            _NEURIPS,
            "1206.2944",
        ),
        _article(
            "scikit2011",
            'Pedregosa, Fabian and Varoquaux, Ga{\\"e}l and Gramfort, Alexandre and '
            "Michel, Vincent and others",
            "Scikit-learn: Machine Learning in {Python}",
            "Journal of Machine Learning Research",
            volume="12",
            year="2011",
        ),
        _article(
            "williams1992",
            "Williams, Ronald J.",
            "Simple Statistical Gradient-Following Algorithms for Connectionist "
            "Reinforcement Learning",
            "Machine Learning",
            volume="8",
            year="1992",
        ),
        _paper(
            "jang2017",
            "Jang, Eric and Gu, Shixiang and Poole, Ben",
            "Categorical Reparameterization with {Gumbel-Softmax}",
            "International Conference on Learning Representations",
            "1611.01144",
        ),
        _paper(
            "maddison2017",
            "Maddison, Chris J. and Mnih, Andriy and Teh, Yee Whye",
            "The {Concrete} Distribution: A Continuous Relaxation of Discrete Random "
            "Variables",
            "International Conference on Learning Representations",
            "1611.00712",
        ),
        _article(
            "bengio2013",
            r"Bengio, Yoshua and L{\'e}onard, Nicholas and Courville, Aaron",
            "Estimating or Propagating Gradients Through Stochastic Neurons for "
            "Conditional Computation",
            "arXiv preprint arXiv:1308.3432",
            year="2013",
            eprint="1308.3432",
            archiveprefix="arXiv",
        ),
        _paper(
            "foerster2018",
            "Foerster, Jakob and Farquhar, Gregory and Al-Shedivat, Maruan and "
            r"Rockt{\"a}schel, Tim and Xing, Eric and Whiteson, Shimon",
            "{DiCE}: The Infinitely Differentiable {Monte Carlo} Estimator",
            _ICML,
            "1802.05098",
        ),
        _article(
            "jaderberg2017",
            "Jaderberg, Max and Dalibard, Valentin and Osindero, Simon and Czarnecki, "
            "Wojciech M. and others",
            "Population Based Training of Neural Networks",
            "arXiv preprint arXiv:1711.09846",
            year="2017",
            eprint="1711.09846",
            archiveprefix="arXiv",
        ),
        _paper(
            "jamieson2016",
            "Jamieson, Kevin and Talwalkar, Ameet",
            "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
            _AISTATS,
            "1502.07943",
        ),
        _article(
            "li2018",
            "Li, Lisha and Jamieson, Kevin and DeSalvo, Giulia and Rostamizadeh, "
            "Afshin and Talwalkar, Ameet",
            "{Hyperband}: A Novel Bandit-Based Approach to Hyperparameter Optimization",
            "Journal of Machine Learning Research",
            volume="18",
            year="2018",
            eprint="1603.06560",
            archiveprefix="arXiv",
        ),
        _entry(
            "inproceedings",
            "bender2018",
            author="Bender, Gabriel and Kindermans, Pieter-Jan and Zoph, Barret and "
            "Vasudevan, Vijay and Le, Quoc",
            title="Understanding and Simplifying One-Shot Architecture Search",
            booktitle=_ICML,
            year="2018",
        ),
        _paper(
            "guo2020",
            "Guo, Zichao and Zhang, Xiangyu and Mu, Haoyuan and Heng, Wen and Liu, "
            "Zechun and Wei, Yichen and Sun, Jian",
            "Single Path One-Shot Neural Architecture Search with Uniform Sampling",
            "European Conference on Computer Vision",
            "1904.00420",
        ),
        _paper(
            "zoph2017",
            "Zoph, Barret and Le, Quoc V.",
            "Neural Architecture Search with Reinforcement Learning",
            "International Conference on Learning Representations",
            "1611.01578",
        ),
        _article(
            "sobol1967",
            "Sobol', Ilya M.",
            "On the Distribution of Points in a Cube and the Approximate Evaluation of "
            "Integrals",
            "USSR Computational Mathematics and Mathematical Physics",
            volume="7",
            number="4",
            year="1967",
        ),
        _article(
            "hestenes1952",
            "Hestenes, Magnus R. and Stiefel, Eduard",
            "Methods of Conjugate Gradients for Solving Linear Systems",
            "Journal of Research of the National Bureau of Standards",
            volume="49",
            number="6",
            year="1952",
        ),
        _paper(
            "blondel2022",
            "Blondel, Mathieu and Berthet, Quentin and Cuturi, Marco and Frostig, Roy "
            r"and Hoyer, Stephan and Llinares-L{\'o}pez, Felipe and Pedregosa, Fabian "
            "and Vert, Jean-Philippe",
            "Efficient and Modular Implicit Differentiation",
            _NEURIPS,
            "2105.15183",
        ),
        _article(
            "dembo1982",
            "Dembo, Ron S. and Eisenstat, Stanley C. and Steihaug, Trond",
            "Inexact {Newton} Methods",
            "SIAM Journal on Numerical Analysis",
            volume="19",
            number="2",
            year="1982",
        ),
        _article(
            "schraudolph2002",
            "Schraudolph, Nicol N.",
            "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent",
            "Neural Computation",
            volume="14",
            number="7",
            year="2002",
        ),
        _article(
            "griewank2000",
            "Griewank, Andreas and Walther, Andrea",
            "Algorithm 799: revolve: an implementation of checkpointing for the "
            "reverse or adjoint mode of computational differentiation",
            "ACM Transactions on Mathematical Software",
            volume="26",
            number="1",
            year="2000",
        ),
        _paper(
            "guo2017",
            "Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.",
            "On Calibration of Modern Neural Networks",
            _ICML,
            "1706.04599",
        ),
        _entry(
            "inproceedings",
            "naeini2015",
            author="Naeini, Mahdi Pakdaman and Cooper, Gregory and Hauskrecht, Milos",
            title="Obtaining Well Calibrated Probabilities Using {Bayesian} Binning",
            booktitle=_AAAI,
            year="2015",
        ),
        _paper(
            "karandikar2021",
            "Karandikar, Archit and Cain, Nicholas and Tran, Dustin and "
            "Lakshminarayanan, Balaji and Shlens, Jonathon and Mozer, Michael C. and "
            "Roelofs, Becca",
            "Soft Calibration Objectives for Neural Networks",
            _NEURIPS,
            "2108.00106",
        ),
        _entry(
            "inproceedings",
            "nguyen2013",
            author="Nguyen, Tan and Sanner, Scott",
            title="Algorithms for Direct 0-1 Loss Optimization in Binary "
            "Classification",
            booktitle=_ICML,
            year="2013",
        ),
        _paper(
            "ghosh2017",
            "Ghosh, Aritra and Kumar, Himanshu and Sastry, P. S.",
            "Robust Loss Functions under Label Noise for Deep Neural Networks",
            _AAAI,
            "1712.09482",
        ),
        _paper(
            "lapin2016",
            "Lapin, Maksim and Hein, Matthias and Schiele, Bernt",
            "Loss Functions for Top-k Error: Analysis and Insights",
            "IEEE Conference on Computer Vision and Pattern Recognition",
            "1512.00486",
        ),
        _article(
            "elyaniv2010",
            "El-Yaniv, Ran and Wiener, Yair",
            "On the Foundations of Noise-free Selective Classification",
            "Journal of Machine Learning Research",
            volume="11",
            year="2010",
        ),
        _paper(
            "geifman2017",
            "Geifman, Yonatan and El-Yaniv, Ran",
            "Selective Classification for Deep Neural Networks",
            _NEURIPS,
            "1705.08500",
        ),
        _article(
            "benedict2022",
            r"B{\'e}n{\'e}dict, Gabriel and Koops, Hendrik Vincent and Odijk, Daan and "
            "de Rijke, Maarten",
            "{sigmoidF1}: A Smooth {F1} Score Surrogate Loss for Multilabel "
            "Classification",
            "Transactions on Machine Learning Research",
            year="2022",
            eprint="2108.10566",
            archiveprefix="arXiv",
        ),
        _paper(
            "milletari2016",
            "Milletari, Fausto and Navab, Nassir and Ahmadi, Seyed-Ahmad",
            "{V-Net}: Fully Convolutional Neural Networks for Volumetric Medical Image "
            "Segmentation",
            "International Conference on 3D Vision",
            "1606.04797",
        ),
        _entry(
            "inproceedings",
            "rahman2016",
            author="Rahman, Md Atiqur and Wang, Yang",
            title="Optimizing Intersection-Over-Union in Deep Neural Networks for "
            "Image Segmentation",
            booktitle="International Symposium on Visual Computing",
            year="2016",
        ),
        _entry(
            "inproceedings",
            "herschtal2004",
            author="Herschtal, Alan and Raskutti, Bhavani",
            title="Optimising Area Under the {ROC} Curve Using Gradient Descent",
            booktitle=_ICML,
            year="2004",
        ),
        _entry(
            "inproceedings",
            "narasimhan2013",
            author="Narasimhan, Harikrishna and Agarwal, Shivani",
            title="A Structural {SVM} Based Approach for Optimizing Partial {AUC}",
            booktitle=_ICML,
            year="2013",
        ),
        _article(
            "rust2023",
            "Rust, Kyle R. and Hocking, Toby D.",
            "A Log-linear Gradient Descent Algorithm for Unbalanced Binary "
            "Classification using the All Pairs Squared Hinge Loss",
            "arXiv preprint arXiv:2302.11062",
            year="2023",
            eprint="2302.11062",
            archiveprefix="arXiv",
        ),
        _entry(
            "software",
            "deepmind2020jax",
            author="{DeepMind} and Babuschkin, Igor and others",
            title="The {DeepMind} {JAX} {Ecosystem}",
            url="http://github.com/google-deepmind",
            year="2020",
        ),
        _article(
            "lineax2023",
            "Rader, Jason and Lyons, Terry and Kidger, Patrick",
            "Lineax: unified linear solves and linear least-squares in {JAX} and "
            "{Equinox}",
            "arXiv preprint arXiv:2311.17283",
            year="2023",
            eprint="2311.17283",
            archiveprefix="arXiv",
        ),
        _article(
            "optimistix2024",
            "Rader, Jason and Lyons, Terry and Kidger, Patrick",
            "Optimistix: modular optimisation in {JAX} and {Equinox}",
            "arXiv preprint arXiv:2402.09983",
            year="2024",
            eprint="2402.09983",
            archiveprefix="arXiv",
        ),
        _paper(
            "brown2020",
            "Brown, Andrew and Xie, Weidi and Kalogeiton, Vicky and Zisserman, Andrew",
            "{Smooth-AP}: Smoothing the Path Towards Large-Scale Image Retrieval",
            "European Conference on Computer Vision",
            "2007.12163",
        ),
        _entry(
            "inproceedings",
            "cakir2019",
            author="Cakir, Fatih and He, Kun and Xia, Xide and Kulis, Brian and "
            "Sclaroff, Stan",
            title="Deep Metric Learning to Rank",
            booktitle=_CVPR,
            year="2019",
        ),
        _paper(
            "rolinek2020",
            r"Rol{\'i}nek, Michal and Musil, V{\'i}t and Paulus, Anselm and "
            "Vlastelica, Marin and Michaelis, Claudio and Martius, Georg",
            "Optimizing Rank-based Metrics with Blackbox Differentiation",
            _CVPR,
            "1912.03500",
        ),
        _paper(
            "vlastelica2020",
            r"Vlastelica, Marin and Paulus, Anselm and Musil, V{\'i}t and Martius, "
            r"Georg and Rol{\'i}nek, Michal",
            "Differentiation of Blackbox Combinatorial Solvers",
            "International Conference on Learning Representations",
            "1912.02175",
        ),
        _paper(
            "blondel2020",
            "Blondel, Mathieu and Teboul, Olivier and Berthet, Quentin and Djolonga, "
            "Josip",
            "Fast Differentiable Sorting and Ranking",
            _ICML,
            "2002.08871",
        ),
        _article(
            "amos2019",
            "Amos, Brandon and Koltun, Vladlen and Kolter, J. Zico",
            "The Limited Multi-Label Projection Layer",
            "arXiv preprint arXiv:1906.08707",
            year="2019",
            eprint="1906.08707",
            archiveprefix="arXiv",
        ),
        _article(
            "jarvelin2002",
            r"J{\"a}rvelin, Kalervo and Kek{\"a}l{\"a}inen, Jaana",
            "Cumulated gain-based evaluation of {IR} techniques",
            "ACM Transactions on Information Systems",
            volume="20",
            number="4",
            year="2002",
        ),
        _entry(
            "inproceedings",
            "mcsherry2008",
            author="McSherry, Frank and Najork, Marc",
            title="Computing Information Retrieval Performance Measures Efficiently in "
            "the Presence of Tied Scores",
            booktitle="European Conference on Information Retrieval",
            year="2008",
        ),
        _entry(
            "inproceedings",
            "voorhees1999",
            author="Voorhees, Ellen M.",
            title="The {TREC-8} Question Answering Track Report",
            booktitle="Text REtrieval Conference",
            year="1999",
        ),
        _article(
            "qin2010",
            "Qin, Tao and Liu, Tie-Yan and Li, Hang",
            "A general approximation framework for direct optimization of information "
            "retrieval measures",
            "Information Retrieval",
            volume="13",
            number="4",
            year="2010",
        ),
        _article(
            "everingham2010",
            "Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and "
            "Winn, John and Zisserman, Andrew",
            "The {PASCAL} Visual Object Classes ({VOC}) Challenge",
            "International Journal of Computer Vision",
            volume="88",
            number="2",
            year="2010",
        ),
        _paper(
            "lin2014",
            "Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and "
            r"Perona, Pietro and Ramanan, Deva and Doll{\'a}r, Piotr and Zitnick, C. "
            "Lawrence",
            "{Microsoft COCO}: Common Objects in Context",
            "European Conference on Computer Vision",
            "1405.0312",
        ),
        _article(
            "zadeh1963",
            "Zadeh, Lotfi A.",
            "Optimality and non-scalar-valued performance criteria",
            "IEEE Transactions on Automatic Control",
            volume="8",
            number="1",
            year="1963",
        ),
        _paper(
            "lin2024",
            "Lin, Xi and Zhang, Xiaoyuan and Yang, Zhiyuan and Liu, Fei and Wang, "
            "Zhenkun and Zhang, Qingfu",
            "Smooth {Tchebycheff} Scalarization for Multi-Objective Optimization",
            _ICML,
            "2402.19078",
        ),
        _article(
            "desideri2012",
            r"D{\'e}sid{\'e}ri, Jean-Antoine",
            "Multiple-gradient descent algorithm ({MGDA}) for multiobjective "
            "optimization",
            r"Comptes Rendus Math{\'e}matique",
            volume="350",
            number="5-6",
            year="2012",
        ),
        _paper(
            "sener2018",
            "Sener, Ozan and Koltun, Vladlen",
            "Multi-Task Learning as Multi-Objective Optimization",
            _NEURIPS,
            "1810.04650",
        ),
        _article(
            "quinton2024",
            r"Quinton, Pierre and Rey, Val{\'e}rian",
            "Jacobian Descent for Multi-Objective Optimization",
            "arXiv:2406.16232",
            year="2024",
            eprint="2406.16232",
            archiveprefix="arXiv",
        ),
        _entry(
            "inproceedings",
            "mahapatra2020",
            author="Mahapatra, Debabrata and Rajan, Vaibhav",
            title="Multi-Task Learning with User Preferences: Gradient Descent with "
            "Controlled Ascent in {Pareto} Optimization",
            booktitle=_ICML,
            pages="6597--6607",
            year="2020",
        ),
        _article(
            "hestenes1969",
            "Hestenes, Magnus R.",
            "Multiplier and gradient methods",
            "Journal of Optimization Theory and Applications",
            volume="4",
            number="5",
            year="1969",
        ),
        _article(
            "rockafellar1973",
            "Rockafellar, R. Tyrrell",
            "The multiplier method of {Hestenes} and {Powell} applied to convex "
            "programming",
            "Journal of Optimization Theory and Applications",
            volume="12",
            number="6",
            year="1973",
        ),
        _article(
            "zitzler1999",
            "Zitzler, Eckart and Thiele, Lothar",
            "Multiobjective evolutionary algorithms: a comparative case study and the "
            "strength {Pareto} approach",
            "IEEE Transactions on Evolutionary Computation",
            volume="3",
            number="4",
            year="1999",
        ),
    ]
)
